"""What `inference.py` measures, as data, and its tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from measuring import describe_machine
from quality_report import format_table

from gqaprune.commands.speed import Run


@dataclass(frozen=True)
class Case:
    """What is measured.

    Args:
        model: a name in `GEOMETRIES`, or what `gqaprune.load` takes.
        dtype: of the weights.
        device: `cpu` or `cuda`.
        prompt: tokens read at once.
        generated: tokens written after them, one by one.
    """

    model: str
    dtype: str
    device: str
    prompt: int
    generated: int


@dataclass(frozen=True)
class Result:
    """A pruned model beside the dense one.

    Args:
        name: of the variant.
        dense: the dense model's runs.
        pruned: its own, in turn with those.
        ideal: speed-up that the parameters removed would give, by kind of work.
        peaks: peak memory of both beyond that of a process without a model, bytes.
        weights: size of both models' weights, bytes.
        cache: bytes of the KV cache by its plan's shapes.
        widths: smallest and largest MLP width.
        removed: share of the decoder layers' parameters that went.
    """

    name: str
    dense: Sequence[Run]
    pruned: Sequence[Run]
    ideal: Mapping[str, float]
    peaks: tuple[int, int]
    weights: tuple[int, int]
    cache: int
    widths: tuple[int, int]
    removed: float


def build_speed_line(result: Result, case: Case, kind: str) -> list[str]:
    """A variant's line in the table of prefill or of decode."""
    tokens = case.prompt if kind == "prefill" else case.generated
    before, after = ([getattr(each, kind) for each in runs] for runs in (result.dense, result.pruned))
    gains = [dense / pruned for dense, pruned in zip(before, after, strict=True)]
    ideal, widths = result.ideal[kind], dict.fromkeys(result.widths)
    return [
        result.name,
        f"{result.removed:.1%}",
        " to ".join(f"{width:,}" for width in widths),
        *(
            f"{tokens / median(times):.1f} ({tokens / max(times):.1f} to {tokens / min(times):.1f})"
            for times in (before, after)
        ),
        f"{median(gains):.2f} ({min(gains):.2f} to {max(gains):.2f})",
        f"{ideal:.2f}",
        f"{median(gains) / ideal:.2f}",
    ]


def build_memory_line(result: Result) -> list[str]:
    """A variant's line in the table of memory."""
    seen = {each.cache_bytes for each in result.pruned}
    return [
        result.name,
        f"{result.weights[1] / 2**20:.0f} MiB ({result.weights[1] / result.weights[0]:.2f})",
        f"{result.peaks[1] / 2**20:.0f} MiB ({result.peaks[1] / result.peaks[0]:.2f})",
        " or ".join(f"{size:,}" for size in sorted(seen)),
        f"{result.cache:,}",
        f"{result.cache / result.dense[0].cache_bytes:.2f}",
    ]


def describe(results: Sequence[Result], case: Case) -> str:
    """The tables, as Markdown."""
    turns, first = len(results[0].dense), results[0]
    text = [
        f"{case.model} in {case.dtype}: a prompt of {case.prompt:,} tokens, then {case.generated} one by one, batch 1. "
        f"{describe_machine(case.device)}. {turns} turns each, dense and pruned alternately: medians, in brackets the "
        "lowest and the highest. The speed-up is the median of the turns' own.",
    ]
    for kind in ("prefill", "decode"):
        header = [
            f"{kind}",
            "removed",
            "MLP width",
            "dense, tokens/s",
            "pruned, tokens/s",
            "speed-up",
            "ideal",
            "of the ideal",
        ]
        text += ["", *format_table(header, [build_speed_line(result, case, kind) for result in results])]
    header = ["memory", "weights (of dense)", "peak (of dense)", "KV cache, bytes", "by its shapes", "of dense"]
    text += ["", *format_table(header, [build_memory_line(result) for result in results]), ""]
    text.append(
        f"Peak: {'of torch on the GPU' if case.device == 'cuda' else 'resident'}, beyond the process without a model. "
        f"Dense: weights {first.weights[0] / 2**20:.0f} MiB, peak {first.peaks[0] / 2**20:.0f} MiB, KV cache "
        f"{first.dense[0].cache_bytes:,} bytes."
    )
    return "\n".join(text)
