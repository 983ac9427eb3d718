"""Pruning at full size on one GPU: seconds and peak memory of each stage, and the same in 24 GiB.

    python benchmarks/gpu.py                            # Llama-3-8B's shapes, then Qwen2.5-7B's
    python benchmarks/gpu.py --geometry qwen2.5-7b      # one of them has all the time
    python benchmarks/gpu.py --geometry qwen2.5-7b --epochs 3 --seconds 1800      # with the default's refinement
    python benchmarks/gpu.py --device cpu --geometry tiny

Weights (bfloat16) and text are random, 128 windows of 2,048 tokens in batches of 1; what is removed is the default's:
20 % of the decoder, in channels of the middle layers. Every model and cap has a process of its own. With a cap, layers
checkpoint their activations. A stage that does not fit says so in its row, and those that time left out say so, too:
the whole ends after `--seconds`, its tables last.
"""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TypeVar

import torch
from measuring import GEOMETRIES, describe_machine, make_model, make_tokens
from quality_report import format_table, splice
from transformers import PreTrainedModel

from gqaprune import PruningConfig, PruningPlan
from gqaprune.commands.speed import read_clock, read_peak, start_peak
from gqaprune.common.console import console
from gqaprune.planning.allocation import AllocationOptions
from gqaprune.planning.counts import bind_allocation
from gqaprune.planning.selection import budget_blocks, make_plan, read_budget, select_blocks
from gqaprune.scoring.scores import Scores, combine_scores, score_units
from gqaprune.surgery.repair import apply_plan_with_repair

T = TypeVar("T")

HERE = Path(__file__).parent
CAP = 24
"""GiB."""
TEXT: Mapping[str, tuple[int, int]] = {"llama-3-8b": (128, 2048), "qwen2.5-7b": (128, 2048), "tiny": (4, 32)}
"""Geometry -> windows of calibration text, and tokens of each."""
STAGES = ("weights", "scores of fisher", "scores of obs", "cut and repair")


@dataclass(frozen=True)
class Row:
    """One stage.

    Args:
        geometry: name of the model's shapes.
        cap: GiB that the process may take; None for all there is.
        stage: one of `STAGES`.
        seconds: that it took.
        peak: largest number of bytes in use.
        outcome: what became of it.
    """

    geometry: str
    cap: int | None
    stage: str
    seconds: float | None = None
    peak: int | None = None
    outcome: str = "done"


def run_stages(geometry: str, cap: int | None, device: str, epochs: int, report: Callable[[Row], None]) -> None:
    """Make a model, score, cut and repair it; report each stage once it has ended."""

    def attempt(stage: str, work: Callable[[], T]) -> T | None:
        start_peak(device)
        start, result, outcome = read_clock(device), None, "done"
        try:
            result = work()
        except torch.OutOfMemoryError:
            outcome = "**out of memory**"
        report(Row(geometry, cap, stage, read_clock(device) - start, read_peak(device), outcome))
        return result

    config = PruningConfig(allocation="uniform", repair={"epochs": epochs, "distill_tokens": 0})
    model = attempt("weights", lambda: make_model(GEOMETRIES[geometry], torch.bfloat16, device))
    if model is None:
        return
    if cap is not None:
        model.activation_checkpointing_enable()
    batches = make_tokens(model.config, *TEXT[geometry]).split(1)
    blocks = select_blocks(model, config)
    scored = [
        attempt(f"scores of {criterion}", lambda: score_units(model, blocks, batches, criterion))  # noqa: B023
        for criterion in ("fisher", "obs")
    ]
    # Which units go changes no cost: those of one criterion, or of none that reads text, do as well.
    scores = [each for each in scored if each is not None] or [score_units(model, blocks, [], "l2")]
    plan = choose_units(model, config, scores[0] if len(scores) == 1 else combine_scores(*scores))
    attempt(STAGES[-1], lambda: apply_plan_with_repair(model, plan, batches, config.repair))


def choose_units(model: PreTrainedModel, config: PruningConfig, scores: Scores) -> PruningPlan:
    """The plan of a config without what an allocation could ask to be measured besides."""
    blocks, budget = select_blocks(model, config), read_budget(model, config)
    removed = bind_allocation(config, AllocationOptions())(budget_blocks(blocks, scores, config), budget)
    return make_plan(model, blocks, scores, removed, config)


def run_apart(geometry: str, cap: int | None, device: str, epochs: int, seconds: float) -> list[Row]:
    """The same in a process of its own, which is ended after so many seconds; a row for every stage."""
    receiver, sender = get_context("spawn").Pipe(duplex=False)
    process = get_context("spawn").Process(target=_work, args=(geometry, cap, device, epochs, sender))
    rows, end, outcome = [], time.monotonic() + seconds, "the process ended before"
    if seconds > 0:
        process.start()
        sender.close()  # the other end is then the child's alone: its end is seen here
        try:
            while receiver.poll(max(0.0, end - time.monotonic())):
                rows.append(receiver.recv())
                print(" | ".join(build_line(rows[-1])), flush=True)
            outcome = "no time left"
        except EOFError:
            pass
        process.kill()
        process.join()
    else:
        outcome = "no time left"
    return rows + [Row(geometry, cap, stage, outcome=outcome) for stage in STAGES[len(rows) :]]


def _work(geometry: str, cap: int | None, device: str, epochs: int, sender: Connection) -> None:
    console.quiet = True
    if cap is not None:
        torch.cuda.set_per_process_memory_fraction(cap * 2**30 / torch.cuda.get_device_properties(0).total_memory)
    run_stages(geometry, cap, device, epochs, sender.send)


def build_line(row: Row) -> list[str]:
    """A row of the table."""
    seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
    peak = "" if row.peak is None else f"{row.peak / 2**30:.1f}"
    return [row.stage, "none" if row.cap is None else f"{row.cap} GiB", seconds, peak, row.outcome]


def describe(rows: Sequence[Row], device: str, epochs: int) -> str:
    """The table of one geometry, as Markdown."""
    geometry = rows[0].geometry
    windows, length = TEXT[geometry]
    measured = "tensors of torch on the GPU" if device == "cuda" else "resident memory"
    about = (
        f"{geometry}'s shapes, random bfloat16 weights, {windows} windows of {length:,} random tokens, batch 1; 20 % "
        f"of the decoder in channels of the middle layers; least squares, passes of refinement after them: {epochs}. "
        f"{describe_machine(device)}. Peak: {measured}, the model's own among it."
    )
    header = ["stage", "cap", "seconds", "peak GiB", "outcome"]
    return "\n".join([about, "", *format_table(header, [build_line(row) for row in rows])])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write the tables into results/large_models.md, and print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--geometry", nargs="+", choices=list(TEXT), default=["llama-3-8b", "qwen2.5-7b"])
    parser.add_argument("--epochs", type=int, default=0, help="of refinement, after least squares")
    parser.add_argument("--seconds", type=float, default=450, help="after which what has not ended is left out")
    parser.add_argument("--results", type=Path, default=HERE / "results/large_models.md")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no CUDA device: run this where there is one, or try it with --device cpu --geometry tiny")
    end, tables = time.monotonic() + options.seconds, []
    for geometry in options.geometry:
        rows = []
        for cap in (None, CAP) if options.device == "cuda" else (None,):
            rows += run_apart(geometry, cap, options.device, options.epochs, end - time.monotonic())
        tables.append(describe(rows, options.device, options.epochs))
        begin, finish = (f"<!-- gpu-{geometry}:{edge} -->" for edge in ("begin", "end"))
        splice(options.results, f"{begin}\n\n{tables[-1]}\n\n{finish}", begin, finish, f"On a GPU: {geometry}")
    print("\n\n".join(tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
