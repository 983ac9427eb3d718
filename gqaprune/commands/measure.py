"""Measure several models alike, on the same text, one at a time in memory."""

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
        eval_tokens: tokens of each corpus at most, by the first model's tokenizer; None takes all.
        bos: whether every window, and every question of a task, begins with the beginning-of-text token; None does as
            each model's family does.
        lengths: tokens read and tokens written to measure speed and memory with; None measures neither.
        tasks: None runs none.
        dtype: of the weights, as `load_model` takes it.
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
        """Where models are measured."""
        return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class _Text:
    """The text of a corpus that every model reads: all of it, or what so many tokens of the first model hold.

    Args:
        corpus: its name, with the split.
        text: the text.
        ids: the first model's tokens, as they are without a limit.
        again: the tokens that its tokenizer makes of `text`; where a limit cuts a word its end may differ.
    """

    corpus: str
    text: str
    ids: Tensor
    again: list[int]


@dataclass(frozen=True)
class _Candidate:
    """A model that is still to be measured: what is known of it without its weights."""

    model: str
    name: str
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    disk_bytes: int


def measure_models(models: Sequence[str], corpora: Sequence[str], measuring: Measuring) -> Comparison:
    """Measure models on the same text, one at a time in memory.

    Args:
        models: two or more folders, files or names.
        corpora: as `data.evaluation.test`.
        measuring: what, and how.

    Raises:
        ValueError: if a model or corpus cannot be read; where files tell it, before the first model is measured.
    """
    parsed = list(dict.fromkeys(parse_corpus(text, "test") for text in corpora))
    columns = zip(models, _name_columns(models), strict=True)
    candidates = [_find_candidate(model, name, measuring) for model, name in columns]
    texts = [_read_text(candidates[0].tokenizer, corpus, measuring.eval_tokens) for corpus in parsed]
    read = [_tokenize(candidate, texts, measuring) for candidate in candidates]
    if others := [candidate.model for candidate, ids in zip(candidates, read, strict=True) if _differs(ids, texts)]:
        print(
            f"gqaprune: warning: tokenizers differ ({candidates[0].model} against {', '.join(others)}): compare bits "
            "per byte, not perplexities per token",
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
    """Short names, no two alike: the last part where that tells them apart, with a number where nothing does."""
    short = [Path(model).name for model in dict.fromkeys(models)]
    names = [Path(model).name if short.count(Path(model).name) == 1 else model for model in models]
    return [
        name if names.count(name) == 1 else f"{name} ({names[: index + 1].count(name)})"
        for index, name in enumerate(names)
    ]


@contextmanager
def _naming(model: str) -> Iterator[None]:
    """Make errors say which model they are of."""
    try:
        yield
    except ValueError as error:
        if model in str(error):
            raise
        raise ValueError(f"model {model}: {error}") from None


def _find_candidate(model: str, name: str, measuring: Measuring) -> _Candidate:
    """Read all of a model but its weights, so that what is wrong is said before anything is measured."""
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
    """A model's own tokens of each text, `[tokens]`; the very tensors of the first model where they are the same.

    Raises:
        ValueError: if a text does not fill one window, or a window is longer than the model's context.
    """
    read = {}
    for text in texts:
        own = candidate.tokenizer(text.text, verbose=False)["input_ids"]
        read[text.corpus] = text.ids if own == text.again else torch.tensor(own)
        try:
            _cut(candidate, read[text.corpus], measuring)
        except ValueError as error:
            raise ValueError(f"corpus {text.corpus}, tokens of {candidate.model}: {error} (eval_window)") from None
        with _naming(candidate.model):
            check_context(candidate.config, measuring.eval_window, "eval_window")
    return read


def _cut(candidate: _Candidate, ids: Tensor, measuring: Measuring) -> tuple[Tensor, Tensor]:
    """Windows of a model's tokens of a text, and their labels."""
    bos = find_bos(candidate.tokenizer, measuring.bos)
    return cut_windows(ids, measuring.eval_window, measuring.eval_stride, bos)


def _differs(ids_by_corpus: Mapping[str, Tensor], texts: Sequence[_Text]) -> bool:
    """Whether the tokens of some text are not the first model's."""
    return any(ids_by_corpus[text.corpus] is not text.ids for text in texts)


def _measure(candidate: _Candidate, ids_by_corpus: Mapping[str, Tensor], measuring: Measuring) -> Subject:
    """Load a model and measure it; its peak memory still counts what the process holds without it."""
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
    """Medians over turns of the same work; a first turn warms up and does not count."""
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
    """Add what follows from the text, and take from peak memory what is in use now that the model is gone."""
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
    """How each kind of thing is measured, in words; `readers` are the models that read text."""
    lines = []
    if readers:
        words = describe_protocol(
            measuring.eval_window, measuring.eval_stride, measuring.eval_tokens, _describe_bos(measuring, readers)
        )
        lines.append(words + (", counted by the first model's tokenizer" if measuring.eval_tokens else ""))
    if measuring.lengths is not None:
        threads = torch.get_num_threads()
        place = f"{threads} CPU thread" + ("s" if threads > 1 else ", seconds of the processor")
        place = f"one {torch.cuda.get_device_name()}" if measuring.device == "cuda" else place
        prompt, generated = measuring.lengths
        lines.append(
            f"speed and peak memory: {prompt:,} tokens read, {generated:,} written, median of {_TURNS}; {place}"
        )
    if measuring.tasks is not None:
        lines.append(measuring.tasks.protocol)
    return tuple(lines)


def _describe_bos(measuring: Measuring, readers: Sequence[_Candidate]) -> str:
    """Say which windows begin with the beginning-of-text token, by model where they differ."""
    said = {reader.name: describe_bos(reader.tokenizer, measuring.bos) for reader in readers}
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return ", ".join(f"of {name} {words or 'none with BOS'}" for name, words in said.items())
