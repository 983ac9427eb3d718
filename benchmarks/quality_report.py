"""Tables of the quality rows, from their JSON alone."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from gqaprune.common.atomic_files import write_atomically

Row = Mapping[str, Any]

STALE = "†"


def compute_gaps(row: Row, dense: Row | None) -> dict[str, float]:
    """Log gap `ln(perplexity / dense perplexity)` of every text; empty where the dense model read other texts."""
    if dense is None or "perplexity" not in row or "perplexity" not in dense:
        return {}
    if any(row["inputs"][name] != dense["inputs"][name] for name in ("model", "tests", "samples", "protocol")):
        return {}
    return {name: math.log(value / dense["perplexity"][name]) for name, value in row["perplexity"].items()}


def compute_mean_gap(row: Row, dense: Row | None) -> float:
    """What rows are ranked by: the mean of the gaps; infinite for a row without."""
    gaps = compute_gaps(row, dense)
    return sum(gaps.values()) / len(gaps) if gaps else math.inf


def rank_rows(rows: Sequence[Row], rate: float) -> list[Row]:
    """The rows at a rate, lowest mean gap first, failed ones last."""
    dense = find_dense(rows)
    chosen = [row for row in rows if row["rate"] == rate and row is not dense]
    return sorted(chosen, key=lambda row: (compute_mean_gap(row, dense), row["name"]))


def find_dense(rows: Sequence[Row]) -> Row | None:
    """The row of the dense model."""
    return next((row for row in rows if row["method"] == "dense"), None)


def list_rates(rows: Sequence[Row]) -> list[float]:
    """Rates that there are rows at, besides the dense model's."""
    return sorted({row["rate"] for row in rows if row["method"] != "dense"})


def name_rate(rate: float) -> str:
    """What is removed at a rate, in words."""
    return f"{rate:.0%} of decoder-layer parameters removed" if rate else "KV heads alone removed"


def describe_removed(row: Row, dense: Row) -> str:
    """Share of the parameters that went and, where some did, of the KV heads."""
    whole, left = (sum(one["kept"]["kv_heads"]) for one in (dense, row))
    return f"{row['rate_reached']:.2%}" + (f", {1 - left / whole:.1%} of KV" if left < whole else "")


def build_lines(rows: Sequence[Row], rate: float) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the table of a rate, the dense model first."""
    dense = find_dense(rows)
    texts = list(dense["perplexity"]) if dense and "perplexity" in dense else []
    header = ["method", "removed", *texts, "mean gap", "pruning", "peak RSS"]
    lines = []
    if texts:
        lines.append(["dense", "", *(f"{dense['perplexity'][text]:,.2f}" for text in texts), "", "", ""])
    for row in rank_rows(rows, rate):
        name = row["method"] + (f" {STALE}" if row.get("stale") else "")
        gaps = compute_gaps(row, dense)
        if not gaps:
            reason = row.get("error", "measured on other texts than the dense model: run it again")
            lines.append([name, f"failed: {reason}".replace("|", "/"), *[""] * (len(header) - 2)])
            continue
        measured = [f"{row['perplexity'][text]:,.2f} ({gaps[text]:.3f})" for text in texts]
        cost = [f"{row['seconds']:.0f} s" if "seconds" in row else "", f"{row['peak_rss'] / 2**30:.1f} GiB"]
        lines.append([name, describe_removed(row, dense), *measured, f"{compute_mean_gap(row, dense):.3f}", *cost])
    return header, lines


def describe(rows: Sequence[Row]) -> str:
    """How the rows were measured, in words, from what the rows themselves say."""
    dense = find_dense(rows)
    if dense is None or "perplexity" not in dense:
        return "The dense model has not been measured yet: run the row `dense`."
    protocol, versions = dense["inputs"]["protocol"], dense["inputs"]["versions"]
    texts = ", ".join(f"{name} ({count} windows)" for name, count in dense["windows"].items())
    return (
        f"{dense['inputs']['model']} in float32, non-overlapping windows of {protocol['window']:,} tokens, "
        f"token-weighted: {texts}. In brackets the log gap ln(perplexity / dense perplexity); rows are ranked by its "
        f"mean over the texts. Embedded text and sources are those of Python {versions['python']}. Calibration: "
        f"windows of the calibration text, the same for all rows that need some. torch {versions['torch']}, "
        f"transformers {versions['transformers']}; peers in their own environment (`benchmarks/requirements.txt`)."
        + (f" {STALE}: measured with earlier sources or settings." if any(row.get("stale") for row in rows) else "")
    )


def print_tables(rows: Sequence[Row], console: Console | None = None) -> None:
    """A table per rate on the console."""
    console = console or (Console() if sys.stdout.isatty() else Console(width=160))
    for rate in list_rates(rows):
        header, lines = build_lines(rows, rate)
        table = Table(title=name_rate(rate), title_justify="left")
        table.add_column(header[0], no_wrap=True)
        for name in header[1:]:
            table.add_column(name, justify="right", no_wrap=name != "removed")
        for line in lines:
            table.add_row(*line)
        console.print(table)
    console.print(describe(rows), style="dim")


def write_markdown(rows: Sequence[Row], path: Path) -> None:
    """Write the tables between the markers of a Markdown file; at its end, with markers, if it has none yet.

    Raises:
        ValueError: if the file has one marker without the other.
    """
    dense = find_dense(rows)
    model = dense["inputs"]["model"] if dense else "no model"
    begin, end = (f"<!-- quality, {model}:{edge} -->" for edge in ("begin", "end"))
    parts = [begin, "", describe(rows), ""]
    for rate in list_rates(rows):
        header, lines = build_lines(rows, rate)
        parts += [f"### {name_rate(rate)}", ""]
        parts += [*format_table(header, lines), ""]
    splice(path, "\n".join([*parts, end]), begin, end, f"Quality, all methods, {model}")


def format_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A table's lines in Markdown, all columns but the first to the right."""
    rule = "| --- |" + " ---: |" * (len(header) - 1)
    return ["| " + " | ".join(header) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines)]


def splice(path: Path, section: str, begin: str, end: str, heading: str) -> None:
    """Put a section, which has its markers, in place of the one in a Markdown file; at its end if it has none yet.

    Raises:
        ValueError: if the file has one marker without the other.
    """
    text = path.read_text(encoding="utf-8") if path.exists() else "# Results\n"
    if (begin in text) != (end in text) or text.find(begin) > text.find(end):
        raise ValueError(f"{path} needs both markers, {begin} before {end}, or none")
    if begin in text:
        before, after = text.split(begin, 1)[0], text.split(end, 1)[1]
    else:
        before, after = text.rstrip() + f"\n\n## {heading}\n\n", "\n"
    write_atomically(path, (before + section + after).encode())
