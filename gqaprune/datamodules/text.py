"""Corpora as streams: calibration and train windows, validation and test perplexity, prompts."""

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

    A corpus is `wikitext2`, `ptb` or `c4` (from the hub), any dataset there as `hub:owner/dataset`, `embedded` or
    `stdlib` (Python's own help and sources), or a path, folder or glob of text, jsonl, json and parquet files;
    `@train`, `@validation` or `@test` after it names a split. Named corpora have default splits by stream; local files
    are read whole unless a split is named.

    Rows hold documents (`text`) or conversations: `messages`, `prompt` and `completion`, or `instruction`, `input` and
    `output`. Documents are joined and cut into windows without padding. Conversations go through the tokenizer's chat
    template; training and evaluation pack them whole, and learn and count the assistant's tokens alone.

    Args:
        tokenizer: whose tokenizer to use, as `model.pretrained`; the command line sets it from there.
        calibration: the text that units are scored and repaired on.
        training: the text that recovery trains on.
        evaluation: the text that perplexity is measured on.
        sampling: how the dense model writes windows of its own.
        prompts: what `predict` continues, and what training shows samples of: a list, or a file with one per line, that
            in a `.jsonl` file is a string, an object with `prompt`, or one with `messages` (`role` and `content`).
        chat: put prompts as the user's turn into the tokenizer's chat template; null does so where it has one.
        bos: begin every window of every stream, and every prompt, with the beginning-of-text token; false leaves it to
            the tokenizer, which adds it at a text's beginning or not at all. Null does as the model's family does:
            Gemma needs it, and the usual perplexities of all others go without.
        loss_on: what is learned, and measured, of conversations: the `assistant`'s tokens, or `all`.
        text_field: column of the text in jsonl, json and parquet files, and in datasets on the hub.
        columns: names of columns that are others than `messages`, `prompt`, `completion`, `instruction`, `input`,
            `output`: such as `{messages: dialogue}`.
        seed: seed of the choice and order of windows.
        trust_remote_code: run code that comes with the tokenizer; the command line sets it from `model`.

    Groups of settings may be given as dictionaries, such as `training={"window": 1024}`.

    Raises:
        ValueError: if calibration or training text overlaps with text that is evaluated, or a setting is out of bounds.
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
        """How perplexity is measured, in words."""
        settings = self.evaluation
        return describe_protocol(
            settings.window, settings.stride, settings.tokens, describe_bos(self.tokenizer, self.bos)
        )

    def prepare_data(self) -> None:
        """Fill the hub's cache from one process, with what the command needs."""
        assert self.trainer is not None and self.trainer.state.fn is not None
        for stream in self._get_streams(self.trainer.state.fn.value):
            for corpus in self.corpora[stream]:
                if corpus.name in HUB or corpus.name.startswith(ANY_HUB):
                    read_corpus(corpus)

    def setup(self, stage: str) -> None:
        """Read what the stage needs, so that missing text is said before a model is loaded."""
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
        """Refuse text of the command that is longer than a model's context: windows, and prompts to continue.

        Raises:
            ValueError: naming the setting.
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
        """Names of a stream's corpora in logs, in the order of its dataloaders."""
        labels = [corpus.label for corpus in self.corpora[stream]]
        return [str(c) if labels.count(c.label) > 1 else c.label for c in self.corpora[stream]]

    @property
    def calibration_sources(self) -> list[str]:
        """What calibration reads, by name."""
        count = self.calibration.sampled_windows
        sampled = [f"{count} sampled windows"] if count else []
        return [str(corpus) for corpus in self.corpora["calibration"]] + sampled

    def read_calibration_windows(self) -> Tensor:
        """Windows of the calibration corpora, `[windows, tokens]`; none without corpora.

        Held-out windows come first: where the corpora have too few for both, up to half of them are held out.
        """
        corpora = self.corpora["calibration"]
        if self._calibration_windows is None and not corpora:
            self._calibration_windows = torch.empty(0, self.calibration.window, dtype=torch.long)
        if self._calibration_windows is None:
            limit = None
            count, held_out = self._count_calibration_windows()
            if count is not None:  # so much of each corpus, at most, that the choice stays a choice
                limit = 16 * count * self.calibration.window
            wanted = None if count is None else count + held_out
            windows = read_windows(self.tokenizer, corpora, self.calibration.window, wanted, self.seed, limit, self.bos)
            held_out = self._reserve_held_out(len(windows), count, held_out)
            self._calibration_windows, self._held_out_windows = windows.tensor_split([len(windows) - held_out])
        return self._calibration_windows

    def held_out_batches(self) -> list[Batch]:
        """Windows of the calibration corpora that are not calibrated on, as batches to evaluate; none where all are."""
        self.read_calibration_windows()
        windows = self._held_out_windows
        return [] if windows is None or not len(windows) else make_batches(windows, windows, self.evaluation.batch_size)

    def calibration_batches(self, model: PreTrainedModel | None = None) -> list[Tensor]:
        """Calibration token ids, each `[calibration.batch_size, calibration.window]`, the same on every rank.

        Args:
            model: the dense causal LM, which writes the sampled windows, if any are wanted.

        Raises:
            ValueError: if there is no text to calibrate on, no model to write it, or the windows are longer than the
                model's context.
        """
        if model is not None:
            check_context(model.config, self.calibration.window, "data.calibration.window")
        windows = self.read_calibration_windows()
        if count := self._rehearse(self.calibration.sampled_windows, self.calibration.batch_size):
            if model is None:
                raise ValueError(f"data.calibration.sampled_windows is {count}: give the model that writes them")
            sampled = self._sample(model, count, self.calibration.window, self.seed)
            windows = torch.cat([windows, sampled])
            windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(self.seed))]
        if not len(windows):
            raise ValueError("data.calibration has neither corpora nor sampled_windows: give one of them")
        return list(windows.split(self.calibration.batch_size))[: 1 if self._is_rehearsal else None]

    def evaluation_batches(self, streams: Sequence[str] = ("val", "test")) -> dict[str, list[Batch]]:
        """Batches of all evaluation corpora, as `val/<corpus>` and `test/<corpus>`, or of one of the two streams."""
        return {
            f"{stream}/{label}": make_batches(*windows, self.evaluation.batch_size)[: 1 if self._is_rehearsal else None]
            for stream in streams
            for label, windows in self._evaluation_windows(stream).items()
        }

    def train_dataloader(self) -> DataLoader[Batch]:
        """Training windows of the corpora and of the dense model, this rank's share, shuffled anew every epoch."""
        dataset = Windows(*self._read_train())
        return TrainLoader(
            dataset,
            self.training.batch_size,
            sampler=DistributedSampler(dataset, **self._place, shuffle=True, seed=self.seed),
        )

    def count_train_batches(self) -> int:
        """Count the training batches of an epoch on each device; the dense model need not have written its windows."""
        windows = len(self._read_train_corpora()[0]) + self._count_sampled_train_windows()
        # `overfit_batches` gives every device the same ones.
        is_shared = self.trainer is None or not self.trainer.overfit_batches  # type: ignore[attr-defined]
        return math.ceil(windows / (self._place["num_replicas"] if is_shared else 1) / self.training.batch_size)

    def read_train_windows(self) -> Tensor:
        """Training windows in their own order, `[windows, tokens]`: `index` in a training batch is a place here.

        Raises:
            ValueError: if some of them come from the dense model, which has not written them yet.
        """
        return self._read_train()[0]

    @property
    def learns_all(self) -> bool:
        """Whether every token of the training windows has a label, but for those that begin them."""
        return not (self._read_train_corpora()[1][:, 1:] == IGNORED).any()

    def _read_train(self) -> tuple[Tensor, Tensor]:
        """Training windows and labels, those of the dense model last."""
        windows, labels = self._read_train_corpora()
        if count := self._count_sampled_train_windows():
            if self._sampled_train_windows is None:
                raise ValueError(
                    f"data.training.sampled_windows is {count}: sample_train_windows(dense model) "
                    "comes first, as gqaprune.callbacks.TaylorPruning does it"
                )
            windows, labels = (torch.cat([own, self._sampled_train_windows]) for own in (windows, labels))
        return windows, labels

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """One loader per validation corpus."""
        return self._evaluation_loaders("val")

    def count_evaluation_batches(self, stream: str) -> list[int]:
        """Count the batches of each evaluation corpus on each device."""
        return [math.ceil(len(loader) / self._world_size) for loader in self._evaluation_loaders(stream)]

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """One loader per test corpus."""
        return self._evaluation_loaders("test")

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Prompts, one per batch."""
        return DataLoader([ids for _, ids in self.encode_prompts()], batch_size=None)  # type: ignore[arg-type]

    def encode_prompts(self) -> list[tuple[Prompt, dict[str, Tensor]]]:
        """Every prompt and what the model reads of it, `input_ids`, `[1, tokens]`.

        Raises:
            ValueError: if the prompts cannot be read, or not be put as they are wanted.
        """
        if self._encoded_prompts is None:
            prompts = read_prompts(self.prompts)
            encoded = encode_prompts(self.tokenizer, prompts, self.chat, self.bos)
            self._encoded_prompts = list(zip(prompts, encoded, strict=True))
        return self._encoded_prompts

    def sample_train_windows(self, model: PreTrainedModel) -> None:
        """Let the dense causal LM write the training windows that are wanted from it. Every rank has to call it."""
        if count := self._count_sampled_train_windows():
            # Another seed than calibration's: recovery is to see other text.
            self._sampled_train_windows = self._sample(model, count, self.training.window, self.seed + 1)

    @property
    def _is_rehearsal(self) -> bool:
        """Whether the trainer only tries whether a run works, so that a batch of everything is enough."""
        return self.trainer is not None and bool(self.trainer.fast_dev_run)  # type: ignore[attr-defined]

    def _rehearse(self, windows: int, batch_size: int) -> int:
        return min(windows, batch_size) if self._is_rehearsal else windows

    def _count_sampled_train_windows(self) -> int:
        return self._rehearse(self.training.sampled_windows, self.training.batch_size)

    def _count_calibration_windows(self) -> tuple[int | None, int]:
        """Windows to calibrate on, None for all, and windows to hold out."""
        settings = self.calibration
        if self._is_rehearsal:
            return settings.batch_size, min(settings.held_out_windows, settings.batch_size)
        return settings.windows, settings.held_out_windows

    def _reserve_held_out(self, windows: int, count: int | None, asked: int) -> int:
        """Return how many of the calibration corpora's windows are held out; say so if they are too few for all."""
        spare = windows // 2 if count is None else max(windows // 2, windows - count)
        held_out = min(asked, spare)
        is_short = held_out < asked or windows - held_out < (count or 0)
        if is_short and get_rank_and_world_size()[0] == 0:
            wanted = "all" if count is None else count
            console.print(
                f"calibration: the corpora hold {windows} windows of {self.calibration.window} tokens; "
                f"{windows - held_out} are calibrated on ({wanted} wanted) and {held_out} held out ({asked} wanted)"
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
        """Windows and labels of the training corpora, mixed."""
        if self._train_corpora_windows is None:
            read = [self._read_labelled(corpus, "training") for corpus in self.corpora["train"]]
            if not read and not self.training.sampled_windows:
                raise ValueError("data.training has neither corpora nor sampled_windows: give one of them")
            none = torch.empty(0, self.training.window, dtype=torch.long)
            windows, labels = (torch.cat([none, *(pair[part] for pair in read)]) for part in (0, 1))
            order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(self.seed))
            self._train_corpora_windows = windows[order], labels[order]
            if get_rank_and_world_size()[0] == 0 and not self.learns_all:
                begins = (labels[:, 1] == IGNORED).nonzero().flatten()  # with what is not learned, as conversations do
                first = int(begins[0]) if len(begins) else 0
                encoded = Encoded(windows[first].tolist(), labels[first].tolist())
                example = describe_example(self.tokenizer, encoded)
                console.print(f"a training window, ⟦what is not learned⟧ in brackets: {example}", markup=False)
        return self._train_corpora_windows

    def _read_labelled(self, corpus: Corpus, group: str) -> tuple[Tensor, Tensor]:
        """Windows and labels of a corpus, as a group of settings has them."""
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
                        f"data.{setting} {mine} overlaps with data.evaluation.{evaluated} {theirs}: perplexity on text "
                        "the model has seen in calibration or training means nothing; use another split or file, "
                        "for example name@train and name@test"
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
        """The number of devices that training data is split over, and which of them this one is."""
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
