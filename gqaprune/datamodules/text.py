"""Corpora as streams: calibration and train windows, validation and test perplexity, prompts."""

from collections.abc import Sequence
from itertools import product

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gqaprune.data.corpora import HUB, Corpus, parse_corpus, read_corpus
from gqaprune.data.prompts import Prompt, encode_prompt, read_prompts
from gqaprune.data.sampling import sample_from_model
from gqaprune.data.windows import (
    Batch,
    choose_batch_size,
    cut_windows,
    describe_protocol,
    make_batches,
    read_windows,
    tokenize_corpus,
)
from gqaprune.datamodules.loaders import TrainLoader, Windows, fill_up
from gqaprune.models.tokenizer import load_tokenizer

_DEFAULT_SPLITS = {"calibration": "train", "train": "train", "val": "validation", "test": "test"}


class TextDataModule(LightningDataModule):
    """Text streams for pruning, fine-tuning and perplexity.

    A corpus is `wikitext2`, `ptb` or `c4` (from the hub), `embedded` (needs no hub), or a path or glob of txt, jsonl
    (field `text`) or parquet (column `text`) files; `@train`, `@validation` or `@test` after it names a split. Named
    corpora have default splits by stream; local files are read whole unless a split is named. Windows are packed:
    no padding.

    Args:
        tokenizer: whose tokenizer to use, as `model.pretrained`; the command line sets it from there.
        calibration: corpora to score units on; none with `sampled_windows` alone.
        train: corpora to fine-tune on.
        val: corpora for perplexity during training, logged as `ppl/<corpus>`.
        test: corpora for reported perplexity.
        calibration_windows: windows to calibrate on, sampled over all calibration corpora; null takes all.
        calibration_window: tokens per calibration window.
        calibration_batch_size: windows per calibration micro-batch.
        held_out_windows: further windows of the calibration corpora, where they have more, that nothing is calibrated
            on: what `PerplexityGuard` measures the model on; 0 turns it off.
        sampled_windows: windows that the dense model writes itself, to calibrate on besides those of the corpora: they
            make up for what the corpora are not like. Kept in the user's cache folder.
        sampled_document: tokens of each document that those windows are packed from: many short ones cover more than
            few long ones.
        sampled_prompts: beginnings of those documents, used in turn; null means the beginning-of-text token.
        temperature: of that sampling, above 0.
        top_p: probability that the tokens sampled from have together, above 0 to 1.
        train_window: tokens per training window.
        train_sampled_windows: windows that the dense model writes itself, to fine-tune on besides those of the corpora
            (`train: []` takes these alone); sampled like `sampled_windows`, but others.
        train_tokens: tokens to read from each training corpus at most; null reads all.
        batch_size: windows per training micro-batch and device.
        eval_window: tokens per evaluation window (2048 is the usual protocol, 128 LLM-Pruner's).
        eval_stride: tokens between the starts of evaluation windows; null means no overlap.
        eval_tokens: tokens to evaluate of each corpus at most, from its beginning; null evaluates all.
        eval_batch_size: windows per evaluation batch and device; null takes as many as have 4,096 tokens. A batch
            that memory does not hold is halved.
        prompts: what `predict` continues, and what training shows samples of: a list, or a file with one per line, that
            in a `.jsonl` file is a string, an object with `prompt`, or one with `messages` (`role` and `content`).
        chat: put prompts as the user's turn into the tokenizer's chat template; null does so where it has one.
        seed: seed of the choice and order of windows.
        trust_remote_code: run code that comes with the tokenizer; the command line sets it from `model`.

    Raises:
        ValueError: if calibration or training text overlaps with text that is evaluated, or a setting is out of bounds.
    """

    def __init__(
        self,
        tokenizer: str,
        calibration: list[str] = ["embedded"],  # noqa: B006  (a literal default reads best in --help; never changed)
        train: list[str] = ["embedded"],  # noqa: B006
        val: list[str] = ["embedded"],  # noqa: B006
        test: list[str] = ["embedded"],  # noqa: B006
        calibration_windows: int | None = 128,
        calibration_window: int = 512,
        calibration_batch_size: int = 4,
        held_out_windows: int = 8,
        sampled_windows: int = 0,
        sampled_document: int = 256,
        sampled_prompts: list[str] | None = None,
        temperature: float = 1.0,
        top_p: float = 1.0,
        train_window: int = 512,
        train_sampled_windows: int = 0,
        train_tokens: int | None = None,
        batch_size: int = 4,
        eval_window: int = 2048,
        eval_stride: int | None = None,
        eval_tokens: int | None = None,
        eval_batch_size: int | None = None,
        prompts: list[str] | str = ["The capital of France is", "Once upon a time"],  # noqa: B006
        chat: bool | None = None,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        sizes = {
            "calibration_windows": calibration_windows,
            "calibration_batch_size": calibration_batch_size,
            "train_tokens": train_tokens,
            "batch_size": batch_size,
            "eval_tokens": eval_tokens,
            "eval_batch_size": eval_batch_size,
        }
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ValueError(f"data.{name} must be at least 1, got {size}")
        counts = {
            "sampled_windows": sampled_windows,
            "train_sampled_windows": train_sampled_windows,
            "held_out_windows": held_out_windows,
        }
        for name, count in counts.items():
            if count < 0:
                raise ValueError(f"data.{name} must be at least 0, got {count}")
        self.tokenizer_source = tokenizer
        self.trust_remote_code = trust_remote_code
        self.calibration_windows = calibration_windows
        self.calibration_window = calibration_window
        self.calibration_batch_size = calibration_batch_size
        self.held_out_windows = held_out_windows
        self.sampled_windows = sampled_windows
        self.sampled_document = sampled_document
        self.sampled_prompts = sampled_prompts or []
        self.temperature = temperature
        self.top_p = top_p
        self.train_window = train_window
        self.train_sampled_windows = train_sampled_windows
        self.train_tokens = train_tokens
        self.batch_size = batch_size
        self.eval_window = eval_window
        self.eval_stride = eval_stride
        self.eval_tokens = eval_tokens
        self.eval_batch_size = eval_batch_size
        self.prompts = prompts
        self.chat = chat
        self.seed = seed
        self.corpora = {
            stream: list(dict.fromkeys(parse_corpus(text, _DEFAULT_SPLITS[stream]) for text in texts))
            for stream, texts in (("calibration", calibration), ("train", train), ("val", val), ("test", test))
        }
        self._check_streams()
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._calibration_windows: Tensor | None = None
        self._held_out_windows: Tensor | None = None
        self._train_corpora_windows: Tensor | None = None
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
        return describe_protocol(self.eval_window, self.eval_stride, self.eval_tokens)

    def prepare_data(self) -> None:
        """Fill the hub's cache from one process, with what the command needs."""
        assert self.trainer is not None and self.trainer.state.fn is not None
        for stream in self._get_streams(self.trainer.state.fn.value):
            for corpus in self.corpora[stream]:
                if corpus.name in HUB:
                    read_corpus(corpus)

    def setup(self, stage: str) -> None:
        """Read what the stage needs, so that missing text is said before a model is loaded."""
        if stage in ("fit", "predict"):
            self.encode_prompts()
        for stream in self._get_streams(stage):
            if stream == "train":
                self._read_train_corpora()
            elif stream in ("val", "test"):
                self._evaluation_windows(stream)

    def get_labels(self, stream: str) -> list[str]:
        """Names of a stream's corpora in logs, in the order of its dataloaders."""
        labels = [corpus.label for corpus in self.corpora[stream]]
        return [str(c) if labels.count(c.label) > 1 else c.label for c in self.corpora[stream]]

    @property
    def calibration_sources(self) -> list[str]:
        """What calibration reads, by name."""
        sampled = [f"{self.sampled_windows} sampled windows"] if self.sampled_windows else []
        return [str(corpus) for corpus in self.corpora["calibration"]] + sampled

    def read_calibration_windows(self) -> Tensor:
        """Windows of the calibration corpora, `[windows, calibration_window]`; none without corpora."""
        corpora = self.corpora["calibration"]
        if self._calibration_windows is None and not corpora:
            self._calibration_windows = torch.empty(0, self.calibration_window, dtype=torch.long)
        if self._calibration_windows is None:
            limit = None
            count = self.calibration_windows
            if count is not None:  # so much of each corpus, at most, that the choice stays a choice
                limit = 16 * count * self.calibration_window
            wanted = None if count is None else count + self.held_out_windows
            windows = read_windows(self.tokenizer, corpora, self.calibration_window, wanted, self.seed, limit)
            self._calibration_windows, self._held_out_windows = windows[:count], windows[len(windows[:count]) :]
        return self._calibration_windows

    def held_out_batches(self) -> list[Batch]:
        """Windows of the calibration corpora that are not calibrated on, as batches to evaluate; none where all are."""
        self.read_calibration_windows()
        windows = self._held_out_windows
        return [] if windows is None or not len(windows) else make_batches(windows, windows, self.eval_batch_size)

    def calibration_batches(self, model: PreTrainedModel | None = None) -> list[Tensor]:
        """Calibration token ids, each `[calibration_batch_size, calibration_window]`, the same on every rank.

        Args:
            model: the dense causal LM, which writes the sampled windows, if any are wanted.

        Raises:
            ValueError: if there is no text to calibrate on, or no model to write it.
        """
        windows = self.read_calibration_windows()
        if self.sampled_windows:
            if model is None:
                raise ValueError(f"data.sampled_windows is {self.sampled_windows}: give the model that writes them")
            sampled = self._sample(model, self.sampled_windows, self.calibration_window, self.seed)
            windows = torch.cat([windows, sampled])
            windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(self.seed))]
        if not len(windows):
            raise ValueError("data.calibration names no corpus and data.sampled_windows is 0: give one of them")
        return list(windows.split(self.calibration_batch_size))

    def evaluation_batches(self, streams: Sequence[str] = ("val", "test")) -> dict[str, list[Batch]]:
        """Batches of all evaluation corpora, as `val/<corpus>` and `test/<corpus>`, or of one of the two streams."""
        return {
            f"{stream}/{label}": make_batches(*windows, self.eval_batch_size)
            for stream in streams
            for label, windows in self._evaluation_windows(stream).items()
        }

    def train_dataloader(self) -> DataLoader[Batch]:
        """Training windows of the corpora and of the dense model, this rank's share, shuffled anew every epoch."""
        windows = self.read_train_windows()
        strategy = self.trainer.strategy if self.trainer is not None else None
        place = getattr(strategy, "distributed_sampler_kwargs", None) or {"num_replicas": 1, "rank": 0}
        dataset = Windows(windows, windows)
        return TrainLoader(
            dataset, self.batch_size, sampler=DistributedSampler(dataset, shuffle=True, seed=self.seed, **place)
        )

    def read_train_windows(self) -> Tensor:
        """Training windows in their own order, `[windows, train_window]`: `index` in a training batch is a place here.

        Raises:
            ValueError: if some of them come from the dense model, which has not written them yet.
        """
        windows = self._read_train_corpora()
        if self.train_sampled_windows:
            if self._sampled_train_windows is None:
                raise ValueError(
                    f"data.train_sampled_windows is {self.train_sampled_windows}: sample_train_windows(dense model) "
                    "comes first, as gqaprune.callbacks.TaylorPruning does it"
                )
            windows = torch.cat([windows, self._sampled_train_windows])
        return windows

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """One loader per validation corpus."""
        return self._evaluation_loaders("val")

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """One loader per test corpus."""
        return self._evaluation_loaders("test")

    def predict_dataloader(self) -> DataLoader[dict[str, Tensor]]:
        """Prompts, one per batch."""
        return DataLoader([ids for _, ids in self.encode_prompts()], batch_size=None)  # type: ignore[arg-type]

    def encode_prompts(self) -> list[tuple[Prompt, dict[str, Tensor]]]:
        """Every prompt and what the model reads of it, `input_ids` and `attention_mask`, each `[1, tokens]`.

        Raises:
            ValueError: if the prompts cannot be read, or not be put as they are wanted.
        """
        if self._encoded_prompts is None:
            prompts = read_prompts(self.prompts)
            self._encoded_prompts = [(prompt, encode_prompt(self.tokenizer, prompt, self.chat)) for prompt in prompts]
        return self._encoded_prompts

    def sample_train_windows(self, model: PreTrainedModel) -> None:
        """Let the dense causal LM write the training windows that are wanted from it. Every rank has to call it."""
        if self.train_sampled_windows:
            # Another seed than calibration's: recovery is to see other text.
            self._sampled_train_windows = self._sample(
                model, self.train_sampled_windows, self.train_window, self.seed + 1
            )

    def _sample(self, model: PreTrainedModel, count: int, window: int, seed: int) -> Tensor:
        return sample_from_model(
            model,
            self.tokenizer,
            count,
            window,
            document=self.sampled_document,
            prompts=self.sampled_prompts,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=seed,
        )

    def _read_train_corpora(self) -> Tensor:
        corpora = self.corpora["train"]
        if self._train_corpora_windows is None and not corpora and self.train_sampled_windows:
            self._train_corpora_windows = torch.empty(0, self.train_window, dtype=torch.long)
        if self._train_corpora_windows is None:
            self._train_corpora_windows = read_windows(
                self.tokenizer, corpora, self.train_window, None, self.seed, self.train_tokens
            )
        return self._train_corpora_windows

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
                    raise ValueError(
                        f"data.{used} {mine} overlaps with data.{evaluated} {theirs}: perplexity on text "
                        "the model has seen in calibration or training means nothing; use another split or file, "
                        "for example name@train and name@test"
                    )

    def _evaluation_windows(self, stream: str) -> dict[str, tuple[Tensor, Tensor]]:
        if stream not in self._windows:
            self._windows[stream] = {
                label: self._cut(corpus)
                for label, corpus in zip(self.get_labels(stream), self.corpora[stream], strict=True)
            }
        return self._windows[stream]

    def _cut(self, corpus: Corpus) -> tuple[Tensor, Tensor]:
        tokens = tokenize_corpus(self.tokenizer, corpus, self.eval_tokens)
        try:
            return cut_windows(tokens, self.eval_window, self.eval_stride)
        except ValueError as error:
            raise ValueError(f"corpus {corpus}: {error} (data.eval_window)") from None

    def _evaluation_loaders(self, stream: str) -> list[DataLoader[Batch]]:
        world_size = self.trainer.world_size if self.trainer is not None else 1
        batch_size = self.eval_batch_size or choose_batch_size(self.eval_window)
        return [
            DataLoader(Windows(*fill_up(*windows, world_size)), batch_size)
            for windows in self._evaluation_windows(stream).values()
        ]
