"""Measure several models in the same way, on the same text, one at a time in memory."""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from gqaprune.commands.comparison import Comparison, Speed, Subject
from gqaprune.commands.speed import has_peak, read_peak, run, start_peak
from gqaprune.commands.tasks import Tasks
from gqaprune.common.console import console
from gqaprune.data.corpora import Corpus, parse_corpus
from gqaprune.data.windows import cut_windows, describe_bos, describe_protocol, make_batches, tokenize_corpus
from gqaprune.evaluation.perplexity import measure_perplexity
from gqaprune.models.architecture import check_context, read_geometry
from gqaprune.models.dtypes import name_dtype
from gqaprune.models.loading import build_without_weights, load_model
from gqaprune.models.sources import find_weights, load_config
from gqaprune.models.tokenizer import check_tokenizer, find_bos, load_tokenizer
from gqaprune.reporting.report import describe_model

_TURNS = 3


@dataclass(frozen=True)
class Measuring:
    """What to measure of every model, and how.

    Args:
        eval_window: tokens per window.
        eval_stride: tokens between the starts of windows; None means no overlap.
        eval_tokens: largest number of tokens of each corpus, counted with the first model's tokenizer; None means all.
        bos: whether every window, and every question of a task, begins with the beginning-of-text token; None follows
            each model's family.
        lengths: tokens of the prompt and generated tokens for speed and memory; None measures neither.
        tasks: tasks to run; None runs none.
        dtype: type of the weights, as in `load_model`.
        trust_remote_code: run code that comes with the models.
    """

    eval_window: int = 2048
    eval_stride: int | None = None
    eval_tokens: int | None = None
    bos: bool | None = None
    lengths: tuple[int, int] | None = None
    tasks: Tasks | None = None
    dtype: str = "auto"
    trust_remote_code: bool = False

    @property
    def device(self) -> str:
        """The device on which models are measured."""
        return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class _Text:
    """The text of a corpus that every model reads: all of it, or the first model's tokens up to a limit.

    Args:
        corpus: name of the corpus, with the split.
        text: the text.
        ids: the first model's tokens of the corpus, up to the limit.
        again: the first model's tokens of `text`; if the limit cuts a word, their end may differ from `ids`.
    """

    corpus: str
    text: str
    ids: Tensor
    again: list[int]


@dataclass(frozen=True)
class _Candidate:
    """A model that is not measured yet, with everything that is known without its weights."""

    model: str
    name: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    disk_bytes: int


def measure_models(models: Sequence[str], corpora: Sequence[str], measuring: Measuring) -> Comparison:
    """Measure models on the same text, one at a time in memory.

    Args:
        models: two or more folders, files or names.
        corpora: corpora, as in `data.evaluation.test`.
        measuring: what to measure, and how.

    Raises:
        ValueError: if a model or corpus cannot be read; if possible, before the first model is measured.
    """
    parsed = list(dict.fromkeys(parse_corpus(text, "test") for text in corpora))
    columns = zip(models, _name_columns(models), strict=True)
    candidates = [_find_candidate(model, name, measuring) for model, name in columns]
    texts = [_read_text(candidates[0].tokenizer, corpus, measuring.eval_tokens) for corpus in parsed]
    read = [_tokenize(candidate, texts, measuring) for candidate in candidates]
    if others := [candidate.model for candidate, ids in zip(candidates, read, strict=True) if _differs(ids, texts)]:
        print(
            f"gqaprune: warning: the tokenizer of {candidates[0].model} differs from that of {', '.join(others)}: "
            "compare bits per byte, not perplexities per token",
            file=sys.stderr,
        )
    subjects = []
    for candidate, ids_by_corpus in zip(candidates, read, strict=True):
        with _naming(candidate.model):
            subject = _measure(candidate, ids_by_corpus, measuring)
        subjects.append(_finish(subject, texts, ids_by_corpus, measuring.device))
    return Comparison(
        tuple(subjects),
        {text.corpus: len(text.text.encode()) for text in texts},
        _describe(measuring, candidates if texts else []),
    )


def _name_columns(models: Sequence[str]) -> list[str]:
    """Return distinct short names: the last part of a name if it is unique, with a number if the names are the same."""
    short = [Path(model).name for model in dict.fromkeys(models)]
    names = [Path(model).name if short.count(Path(model).name) == 1 else model for model in models]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: index + 1].count(name)})"
        for index, name in enumerate(names)
    ]


@contextmanager
def _naming(model: str) -> Iterator[None]:
    """Add the model's name to errors."""
    try:
        yield
    except ValueError as error:
        if model in str(error):
            raise
        raise ValueError(f"model {model}: {error}") from None


def _find_candidate(model: str, name: str, measuring: Measuring) -> _Candidate:
    """Read everything of a model but its weights, so that errors are raised before anything is measured."""
    trust_remote_code = measuring.trust_remote_code
    with _naming(model):
        config, tokenizer = load_config(model, trust_remote_code), load_tokenizer(model, trust_remote_code)
        read_geometry(config)
        check_tokenizer(tokenizer, build_without_weights(config, trust_remote_code))
        find_bos(tokenizer, measuring.bos)
        disk_bytes = sum(file.stat().st_size for file in find_weights(model))
    return _Candidate(model, name, config, tokenizer, disk_bytes)


def _read_text(tokenizer: PreTrainedTokenizerBase, corpus: Corpus, limit: int | None) -> _Text:
    ids = tokenize_corpus(tokenizer, corpus, limit)
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return _Text(str(corpus), text, ids, tokenizer(text, verbose=False)["input_ids"])


def _tokenize(candidate: _Candidate, texts: Sequence[_Text], measuring: Measuring) -> dict[str, Tensor]:
    """Tokenize each text for a model, `[tokens]`; equal tokens are the same tensor as the first model's.

    Raises:
        ValueError: if a text does not fill one window, or a window is longer than the model's context.
    """
    read = {}
    for text in texts:
        ids = candidate.tokenizer(text.text, verbose=False)["input_ids"]
        read[text.corpus] = text.ids if ids == text.again else torch.tensor(ids)
        try:
            _cut(candidate, read[text.corpus], measuring)
        except ValueError as error:
            raise ValueError(f"corpus {text.corpus}, tokens of {candidate.model}: {error} (eval_window)") from None
        with _naming(candidate.model):
            check_context(candidate.config, measuring.eval_window, "eval_window")
    return read


def _cut(candidate: _Candidate, ids: Tensor, measuring: Measuring) -> tuple[Tensor, Tensor]:
    """Cut a model's tokens of a text into windows with labels."""
    bos = find_bos(candidate.tokenizer, measuring.bos)
    return cut_windows(ids, measuring.eval_window, measuring.eval_stride, bos)


def _differs(ids_by_corpus: Mapping[str, Tensor], texts: Sequence[_Text]) -> bool:
    """Return whether the tokens of any text differ from the first model's."""
    return any(ids_by_corpus[text.corpus] is not text.ids for text in texts)


def _measure(candidate: _Candidate, ids_by_corpus: Mapping[str, Tensor], measuring: Measuring) -> Subject:
    """Load a model and measure it; its peak memory still includes the memory of the process without the model."""
    console.print(f"{candidate.name}: measuring")
    model = load_model(candidate.model, measuring.dtype, trust_remote_code=measuring.trust_remote_code)
    model = model.to(measuring.device).eval()
    evaluation = {corpus: make_batches(*_cut(candidate, ids, measuring)) for corpus, ids in ids_by_corpus.items()}
    perplexity = measure_perplexity(model, evaluation, candidate.name)
    return Subject(
        model=candidate.model,
        dtype=name_dtype(model.dtype),
        geometry=read_geometry(model.config),
        stage=describe_model(candidate.name, model, perplexity, candidate.disk_bytes),
        speed=None if measuring.lengths is None else _measure_speed(model, *measuring.lengths),
        scores={} if measuring.tasks is None else measuring.tasks.run(model, candidate.tokenizer, measuring.bos),
    )


def _measure_speed(model: PreTrainedModel, prompt: int, generated: int) -> Speed:
    """Measure the median speed over turns of the same work, after a turn that warms up."""
    device = model.device.type
    generator = torch.Generator().manual_seed(0)
    prompt_BT = torch.randint(model.config.vocab_size, (1, prompt), generator=generator).to(device)
    run(model, prompt_BT, generated)
    if has_peak(device):
        start_peak(device)
    runs = [run(model, prompt_BT, generated) for _ in range(_TURNS)]
    prefills, decodes = sorted(prompt / one.prefill for one in runs), sorted(generated / one.decode for one in runs)
    return Speed(
        prefill=median(prefills),
        decode=median(decodes),
        peak_bytes=read_peak(device) if has_peak(device) else None,
        prefill_range=(prefills[0], prefills[-1]),
        decode_range=(decodes[0], decodes[-1]),
    )


def _finish(subject: Subject, texts: Sequence[_Text], ids_by_corpus: Mapping[str, Tensor], device: str) -> Subject:
    """Add results that depend on the text, and subtract from peak memory what is in use without the model."""
    speed = subject.speed
    if speed is not None and speed.peak_bytes is not None:
        speed = replace(speed, peak_bytes=max(0, speed.peak_bytes - start_peak(device)))
    tokens = {corpus: len(ids) for corpus, ids in ids_by_corpus.items()}
    return replace(
        subject,
        tokens=tokens,
        bits_per_byte={
            text.corpus: math.log2(subject.stage.perplexity[text.corpus])
            * tokens[text.corpus]
            / len(text.text.encode())
            for text in texts
        },
        has_other_tokenizer=_differs(ids_by_corpus, texts),
        speed=speed,
    )


def _describe(measuring: Measuring, readers: Sequence[_Candidate]) -> tuple[str, ...]:
    """Describe how each quantity is measured; `readers` are the models that read text."""
    lines = []
    if readers:
        words = describe_protocol(
            measuring.eval_window, measuring.eval_stride, measuring.eval_tokens, _describe_bos(measuring, readers)
        )
        lines.append(words + (", counted with the first model's tokenizer" if measuring.eval_tokens else ""))
    if measuring.lengths is not None:
        threads = torch.get_num_threads()
        place = f"{threads} CPU thread" + ("s" if threads > 1 else ", in CPU seconds")
        place = f"one {torch.cuda.get_device_name()}" if measuring.device == "cuda" else place
        prompt, generated = measuring.lengths
        lines.append(
            f"speed and peak memory: {prompt:,} tokens read, {generated:,} generated, median of {_TURNS} turns; {place}"
        )
    if measuring.tasks is not None:
        lines.append(measuring.tasks.protocol)
    return tuple(lines)


def _describe_bos(measuring: Measuring, readers: Sequence[_Candidate]) -> str:
    """Describe which windows begin with the beginning-of-text token, for each model if they differ."""
    said = {reader.name: describe_bos(reader.tokenizer, measuring.bos) for reader in readers}
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return ", ".join(f"{name}: {words or 'none beginning with BOS'}" for name, words in said.items())
