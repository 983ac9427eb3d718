"""Provide corpora as streams: calibration and train windows, validation and test perplexity, prompts."""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, get_args

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gqaprune.common.console import console
from gqaprune.common.distributed import get_rank_and_world_size
from gqaprune.common.renamed import RenamedAttributes, build_group, name_successors
from gqaprune.data.conversations import Encoded, LossOn, describe_example
from gqaprune.data.corpora import ANY_HUB, HUB, Corpus, parse_corpus, read_corpus
from gqaprune.data.examples import Columns
from gqaprune.data.prompts import Prompt, encode_prompts, read_prompts
from gqaprune.data.sampling import sample_from_model
from gqaprune.data.windows import (
    Batch,
    choose_batch_size,
    describe_bos,
    describe_protocol,
    make_batches,
    read_labelled_windows,
    read_windows,
)
from gqaprune.datamodules.config import CalibrationConfig, EvaluationConfig, SamplingConfig, TrainingConfig
from gqaprune.datamodules.loaders import TrainLoader, Windows, fill_up
from gqaprune.evaluation.generation import check_prompt
from gqaprune.models.architecture import check_context, read_context
from gqaprune.models.losses import IGNORED
from gqaprune.models.tokenizer import load_tokenizer

_DEFAULT_SPLITS = {"calibration": "train", "train": "train", "val": "validation", "test": "test"}


class TextDataModule(RenamedAttributes, LightningDataModule):
    """Text streams for pruning, fine-tuning and perplexity.

    A corpus is `wikitext2`, `ptb` or `c4` (from the hub), any hub dataset as `hub:owner/dataset`, `embedded` or
    `stdlib` (Python's own help and sources), or a path, folder or glob of text, jsonl, json and parquet files; a split
    is written after it as `@train`, `@validation` or `@test`. Without one, a named corpus uses the stream's default
    split and local files are read whole.

    Rows are documents (`text`) or conversations: `messages`, `prompt` and `completion`, or `instruction`, `input` and
    `output`. Documents are joined and cut into windows without padding. Conversations are formatted by the tokenizer's
    chat template; training and evaluation pack them whole and use only the assistant's tokens.

    Args:
        tokenizer: model whose tokenizer to use, as `model.pretrained`, from which the command line sets it.
        calibration: the text that units are scored and repaired on.
        training: the text that recovery trains on.
        evaluation: the text that perplexity is measured on.
        sampling: how the dense model writes the sampled windows.
        prompts: prompts that `predict` and the samples during training continue: a list, or a file with one prompt per
            line; in a `.jsonl` file, a line is a string, an object with `prompt`, or one with `messages` (`role` and
            `content`).
        chat: format prompts as the user's turn in the tokenizer's chat template; null does so if there is one.
        bos: begin every window of every stream, and every prompt, with the beginning-of-text token; false leaves it to
            the tokenizer, which adds it at most once per text. Null follows the model's family: true for Gemma, which
            needs it, and false for all others, like published perplexities.
        loss_on: tokens of conversations to learn and to measure: those of the `assistant`, or `all`.
        text_field: column of the text in jsonl, json and parquet files, and in datasets on the hub.
        columns: other names of the columns `messages`, `prompt`, `completion`, `instruction`, `input` and `output`,
            such as `{messages: dialogue}`.
        seed: seed of the choice and order of windows.
        trust_remote_code: run code that comes with the tokenizer; the command line sets it from `model`.

    Groups of settings may be given as dictionaries, such as `training={"window": 1024}`.

    Raises:
        ValueError: if calibration or training text overlaps with evaluation text, or a setting is out of bounds.
    """

    @name_successors("data")
    def __init__(
        self,
        tokenizer: str,
        calibration: CalibrationConfig = CalibrationConfig(),  # noqa: B008  (never changed)
        training: TrainingConfig = TrainingConfig(),  # noqa: B008
        evaluation: EvaluationConfig = EvaluationConfig(),  # noqa: B008
        sampling: SamplingConfig = SamplingConfig(),  # noqa: B008
        prompts: list[str] | str = ["The capital of France is", "Once upon a time"],  # noqa: B006
        chat: bool | None = None,
        bos: bool | None = None,
        loss_on: LossOn = "assistant",
        text_field: str = "text",
        columns: dict[str, str] | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.tokenizer_source = tokenizer
        self.trust_remote_code = trust_remote_code
        self.calibration = build_group("data.calibration", CalibrationConfig, calibration)
        self.training = build_group("data.training", TrainingConfig, training)
        self.evaluation = build_group("data.evaluation", EvaluationConfig, evaluation)
        self.sampling = build_group("data.sampling", SamplingConfig, sampling)
        self.prompts = prompts
        self.chat = chat
        self.bos = bos
        if loss_on not in get_args(LossOn):
            raise ValueError(f"data.loss_on must be assistant or all, got {loss_on!r}")
        self.loss_on = loss_on
        self.seed = seed
        names = Columns(tuple({"text": text_field, **(columns or {})}.items()))
        self.corpora = {
            stream: list(
                dict.fromkeys(
                    parse_corpus(text, _DEFAULT_SPLITS[stream], names)
                    for text in ([texts] if isinstance(texts, str) else texts)
                )
            )
            for stream, texts in (
                ("calibration", self.calibration.corpora),
                ("train", self.training.corpora),
                ("val", self.evaluation.val),
                ("test", self.evaluation.test),
            )
        }
        self._check_streams()
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._read_for_rehearsal = False
        self._calibration_windows: Tensor | None = None
        self._held_out_windows: Tensor | None = None
        self._train_corpora_windows: tuple[Tensor, Tensor] | None = None
        self._sampled_train_windows: Tensor | None = None
        self._windows: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
        self._encoded_prompts: list[tuple[Prompt, dict[str, Tensor]]] | None = None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_source, self.trust_remote_code)
        return self._tokenizer

    @property
    def protocol(self) -> str:
        """A description of how perplexity is measured."""
        settings = self.evaluation
        return describe_protocol(
            settings.window, settings.stride, settings.tokens, describe_bos(self.tokenizer, self.bos)
        )

    def prepare_data(self) -> None:
        """Download the corpora that the command needs into the hub's cache, from one process."""
        assert self.trainer is not None and self.trainer.state.fn is not None
        for stream in self._get_streams(self.trainer.state.fn.value):
            for corpus in self.corpora[stream]:
                if corpus.name in HUB or corpus.name.startswith(ANY_HUB):
                    read_corpus(corpus)

    def setup(self, stage: str) -> None:
        """Read the text that the stage needs, so that missing text raises before a model is loaded."""
        if self._is_rehearsal != self._read_for_rehearsal:
            self._calibration_windows = self._held_out_windows = self._sampled_train_windows = None
            self._read_for_rehearsal = self._is_rehearsal
        if stage in ("fit", "predict"):
            self.encode_prompts()
        for stream in self._get_streams(stage):
            if stream == "train":
                self._read_train_corpora()
            elif stream in ("val", "test"):
                self._evaluation_windows(stream)

    def check_context(self, config: PretrainedConfig) -> None:
        """Raise an error if windows or prompts of the command are longer than the model's context.

        Raises:
            ValueError: with the setting to change.
        """
        assert self.trainer is not None and self.trainer.state.fn is not None
        command = self.trainer.state.fn.value
        windows = {"train": ("training", self.training.window)}
        windows |= dict.fromkeys(("val", "test"), ("evaluation", self.evaluation.window))
        for stream in self._get_streams(command):
            if stream in windows and (self.corpora[stream] or stream == "train"):
                group, window = windows[stream]
                check_context(config, window, f"data.{group}.window")
        for _, batch in self.encode_prompts() if command == "predict" else ():
            check_prompt(batch["input_ids"], read_context(config))

    def get_labels(self, stream: str) -> list[str]:
        """Return the names of a stream's corpora in logs, in the order of its dataloaders."""
        labels = [corpus.label for corpus in self.corpora[stream]]
        return [str(c) if labels.count(c.label) > 1 else c.label for c in self.corpora[stream]]

    @property
    def calibration_sources(self) -> list[str]:
        """Names of the calibration corpora, and the number of sampled windows."""
        count = self.calibration.sampled_windows
        sampled = [f"{count} sampled windows"] if count else []
        return [str(corpus) for corpus in self.corpora["calibration"]] + sampled

    def read_calibration_windows(self) -> Tensor:
        """Read windows of the calibration corpora, `[windows, tokens]`; none without corpora.

        If the corpora have too few windows for calibration and held-out text, up to half of them are held out.
        """
        corpora = self.corpora["calibration"]
        if self._calibration_windows is None and not corpora:
            self._calibration_windows = torch.empty(0, self.calibration.window, dtype=torch.long)
        if self._calibration_windows is None:
            limit = None
            count, held_out = self._count_calibration_windows()
            if count is not None:  # reading 16 times as much as needed leaves a choice
                limit = 16 * count * self.calibration.window
            wanted = None if count is None else count + held_out
            windows = read_windows(self.tokenizer, corpora, self.calibration.window, wanted, self.seed, limit, self.bos)
            held_out = self._reserve_held_out(len(windows), count, held_out)
            self._calibration_windows, self._held_out_windows = windows.tensor_split([len(windows) - held_out])
        return self._calibration_windows

    def held_out_batches(self) -> list[Batch]:
        """Return the held-out windows of the calibration corpora, as batches to evaluate; none if all are used."""
        self.read_calibration_windows()
        windows = self._held_out_windows
        return [] if windows is None or not len(windows) else make_batches(windows, windows, self.evaluation.batch_size)

    def calibration_batches(self, model: PreTrainedModel | None = None) -> list[Tensor]:
        """Return calibration token ids, each `[calibration.batch_size, calibration.window]`, the same on every rank.

        Args:
            model: the dense causal LM, which writes the sampled windows if there are any.

        Raises:
            ValueError: if there is no text to calibrate on, no model to write it, or the windows are longer than the
                model's context.
        """
        if model is not None:
            check_context(model.config, self.calibration.window, "data.calibration.window")
        windows = self.read_calibration_windows()
        if count := self._rehearse(self.calibration.sampled_windows, self.calibration.batch_size):
            if model is None:
                raise ValueError(
                    f"data.calibration.sampled_windows is {count}: pass the model that writes them, as "
                    "calibration_batches(model)"
                )
            sampled = self._sample(model, count, self.calibration.window, self.seed)
            windows = torch.cat([windows, sampled])
            windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(self.seed))]
        if not len(windows):
            raise ValueError("data.calibration has neither corpora nor sampled_windows: set one of them")
        return list(windows.split(self.calibration.batch_size))[: 1 if self._is_rehearsal else None]

    def evaluation_batches(self, streams: Sequence[str] = ("val", "test")) -> dict[str, list[Batch]]:
        """Return the batches of the evaluation corpora of these streams, as `val/<corpus>` and `test/<corpus>`."""
        return {
            f"{stream}/{label}": make_batches(*windows, self.evaluation.batch_size)[: 1 if self._is_rehearsal else None]
            for stream in streams
            for label, windows in self._evaluation_windows(stream).items()
        }

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return a loader of this rank's share of the training windows, shuffled anew every epoch."""
        dataset = Windows(*self._read_train())
        return TrainLoader(
            dataset,
            self.training.batch_size,
            sampler=DistributedSampler(dataset, **self._place, shuffle=True, seed=self.seed),
        )

    def count_train_batches(self) -> int:
        """Count the training batches of an epoch on each device, even before the dense model has written windows."""
        windows = len(self._read_train_corpora()[0]) + self._count_sampled_train_windows()
        # With `overfit_batches` every device trains on the same ones.
        is_shared = self.trainer is None or not self.trainer.overfit_batches  # type: ignore[attr-defined]
        return math.ceil(windows / (self._place["num_replicas"] if is_shared else 1) / self.training.batch_size)

    def read_train_windows(self) -> Tensor:
        """Return the training windows, `[windows, tokens]`, in the order that `index` in a training batch refers to.

        Raises:
            ValueError: if the dense model has not written its windows yet.
        """
        return self._read_train()[0]

    @property
    def learns_all(self) -> bool:
        """Whether every token of the training windows has a label, except their first ones."""
        return not (self._read_train_corpora()[1][:, 1:] == IGNORED).any()

    def _read_train(self) -> tuple[Tensor, Tensor]:
        """Return training windows and labels, those of the dense model last."""
        windows, labels = self._read_train_corpora()
        if count := self._count_sampled_train_windows():
            if self._sampled_train_windows is None:
                raise ValueError(
                    f"data.training.sampled_windows is {count}: call sample_train_windows(dense_model) first, as "
                    "gqaprune.callbacks.TaylorPruning does"
                )
            windows, labels = (torch.cat([own, self._sampled_train_windows]) for own in (windows, labels))
        return windows, labels

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """Return one loader per validation corpus."""
        return self._evaluation_loaders("val")

    def count_evaluation_batches(self, stream: str) -> list[int]:
        """Count the batches of each evaluation corpus on each device."""
        return [math.ceil(len(loader) / self._world_size) for loader in self._evaluation_loaders(stream)]

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """Return one loader per test corpus."""
        return self._evaluation_loaders("test")

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Return a loader of prompts, one per batch."""
        return DataLoader([ids for _, ids in self.encode_prompts()], batch_size=None)  # type: ignore[arg-type]

    def encode_prompts(self) -> list[tuple[Prompt, dict[str, Tensor]]]:
        """Return every prompt with its `input_ids`, `[1, tokens]`.

        Raises:
            ValueError: if the prompts cannot be read or encoded.
        """
        if self._encoded_prompts is None:
            prompts = read_prompts(self.prompts)
            encoded = encode_prompts(self.tokenizer, prompts, self.chat, self.bos)
            self._encoded_prompts = list(zip(prompts, encoded, strict=True))
        return self._encoded_prompts

    def sample_train_windows(self, model: PreTrainedModel) -> None:
        """Sample `data.training.sampled_windows` from the dense causal LM. Every rank must call it."""
        if count := self._count_sampled_train_windows():
            # Another seed than calibration's, so that recovery sees other text.
            self._sampled_train_windows = self._sample(model, count, self.training.window, self.seed + 1)

    @property
    def _is_rehearsal(self) -> bool:
        """Whether the trainer only tries the run (`fast_dev_run`), so that one batch of each kind is enough."""
        return self.trainer is not None and bool(self.trainer.fast_dev_run)  # type: ignore[attr-defined]

    def _rehearse(self, windows: int, batch_size: int) -> int:
        return min(windows, batch_size) if self._is_rehearsal else windows

    def _count_sampled_train_windows(self) -> int:
        return self._rehearse(self.training.sampled_windows, self.training.batch_size)

    def _count_calibration_windows(self) -> tuple[int | None, int]:
        """Return the number of windows to calibrate on, None for all, and the number to hold out."""
        settings = self.calibration
        if self._is_rehearsal:
            return settings.batch_size, min(settings.held_out_windows, settings.batch_size)
        return settings.windows, settings.held_out_windows

    def _reserve_held_out(self, windows: int, count: int | None, asked: int) -> int:
        """Return how many windows of the calibration corpora are held out; print a line if there are too few."""
        spare = windows // 2 if count is None else max(windows // 2, windows - count)
        held_out = min(asked, spare)
        is_short = held_out < asked or windows - held_out < (count or 0)
        if is_short and get_rank_and_world_size()[0] == 0:
            wanted = "all" if count is None else count
            console.print(
                f"the calibration corpora have only {windows} windows of {self.calibration.window} tokens: "
                f"{windows - held_out} are used for calibration ({wanted} wanted) and {held_out} are held out ({asked} "
                "wanted)"
            )
        return held_out

    def _sample(self, model: PreTrainedModel, count: int, window: int, seed: int) -> Tensor:
        return sample_from_model(
            model,
            self.tokenizer,
            count,
            window,
            document=self.sampling.document,
            prompts=self.sampling.prompts or [],
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
            seed=seed,
            bos=self.bos,
        )

    def _read_train_corpora(self) -> tuple[Tensor, Tensor]:
        """Read windows and labels of the training corpora, mixed."""
        if self._train_corpora_windows is None:
            read = [self._read_labelled(corpus, "training") for corpus in self.corpora["train"]]
            if not read and not self.training.sampled_windows:
                raise ValueError("data.training has neither corpora nor sampled_windows: set one of them")
            none = torch.empty(0, self.training.window, dtype=torch.long)
            windows, labels = (torch.cat([none, *(pair[part] for pair in read)]) for part in (0, 1))
            order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(self.seed))
            self._train_corpora_windows = windows[order], labels[order]
            if get_rank_and_world_size()[0] == 0 and not self.learns_all:
                begins = (labels[:, 1] == IGNORED).nonzero().flatten()  # windows that begin a conversation
                first = int(begins[0]) if len(begins) else 0
                encoded = Encoded(windows[first].tolist(), labels[first].tolist())
                example = describe_example(self.tokenizer, encoded)
                console.print(
                    f"a training window, with ⟦text that is not learned⟧ in brackets: {example}", markup=False
                )
        return self._train_corpora_windows

    def _read_labelled(self, corpus: Corpus, group: str) -> tuple[Tensor, Tensor]:
        """Read windows and labels of a corpus with the settings of a group."""
        settings = self.training if group == "training" else self.evaluation
        stride = None if group == "training" else self.evaluation.stride
        try:
            return read_labelled_windows(
                self.tokenizer, corpus, settings.window, stride, settings.tokens, self.bos, self.loss_on
            )
        except ValueError as error:
            raise ValueError(f"corpus {corpus}: {error} (data.{group}.window)") from None

    def _get_streams(self, stage: str) -> tuple[str, ...]:
        if stage == "fit":
            trains = self.trainer is None or self.trainer.limit_train_batches != 0
            tests = self.trainer is None or self.trainer.limit_test_batches != 0
            return ("calibration", *(("train",) if trains else ()), "val", *(("test",) if tests else ()))
        return {"validate": ("val",), "test": ("test",)}.get(stage, ())

    def _check_streams(self) -> None:
        for used, evaluated in product(("calibration", "train"), ("val", "test")):
            for mine, theirs in product(self.corpora[used], self.corpora[evaluated]):
                if mine.overlaps(theirs):
                    setting = {"calibration": "calibration.corpora", "train": "training.corpora"}[used]
                    raise ValueError(
                        f"data.{setting} {mine} overlaps with data.evaluation.{evaluated} {theirs}: perplexity is "
                        "meaningless on text that calibration or training has used; use another split or file, for "
                        "example name@train and name@test"
                    )

    def _evaluation_windows(self, stream: str) -> dict[str, tuple[Tensor, Tensor]]:
        if stream not in self._windows:
            self._windows[stream] = {
                label: self._read_labelled(corpus, "evaluation")
                for label, corpus in zip(self.get_labels(stream), self.corpora[stream], strict=True)
            }
        return self._windows[stream]

    @property
    def _place(self) -> dict[str, Any]:
        """The number of devices that share the training data, and the rank of this one."""
        strategy = self.trainer.strategy if self.trainer is not None else None
        return getattr(strategy, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1

    def _evaluation_loaders(self, stream: str) -> list[DataLoader[Batch]]:
        batch_size = self.evaluation.batch_size or choose_batch_size(self.evaluation.window)
        return [
            DataLoader(Windows(*fill_up(*windows, self._world_size)), batch_size)
            for windows in self._evaluation_windows(stream).values()
        ]
