"""Scoring, repair, pruning and perplexity: seconds against a forward pass, and peak memory above the weights.

    python benchmarks/speed.py --text valid.txt                    # SmolLM2-135M
    python benchmarks/speed.py --geometry llama-3-8b --device cuda # random bfloat16 weights and tokens

Every line works on the same calibration tokens. Seconds are the medians of turns taken alternately in one process; peak
memory is of a process of its own, to which the C library gives and from which it takes memory at once. What others do
is re-created as passes: weight gradients of all samples kept (element-wise Taylor, as LLM-Pruner has it), and
GAQ-Aware-Prune's schedule, for each layer one such pass over the whole model and one perplexity without that layer. Its
passes are all alike, so that one of each is run and counted so often. With activations recomputed a forward of one
window and its input of every layer are the least: the floor.
"""

import argparse
import copy
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from measuring import GEOMETRIES, describe_machine, make_model, make_tokens, start_processes
from quality_report import format_table, splice
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

import gqaprune
from gqaprune import PruningConfig
from gqaprune.commands.speed import read_clock, read_peak, start_peak
from gqaprune.common.console import console
from gqaprune.data.windows import make_batches, read_windows
from gqaprune.evaluation.perplexity import measure_perplexity
from gqaprune.pipeline import prune
from gqaprune.planning.selection import select_blocks
from gqaprune.scoring.outliers import find_outliers
from gqaprune.scoring.scores import score_units

HERE = Path(__file__).parent
BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"
Batches = Sequence[Tensor]
Line = Callable[[PreTrainedModel, Batches], object]


@torch.no_grad()
def run_forward(model: PreTrainedModel, batches: Batches) -> None:
    """Logits, thrown away: the unit of everything here."""
    for batch in batches:
        model(input_ids=batch, use_cache=False)


def run_forward_of_one(model: PreTrainedModel, batches: Batches) -> None:
    """The same of the first window alone."""
    run_forward(model, [batches[0][:1]])


@torch.no_grad()
def run_plain_perplexity(model: PreTrainedModel, batches: Batches) -> None:
    """What a plain loop does: all logits of a batch, in float32."""
    for batch in batches:
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()


def run_perplexity(model: PreTrainedModel, batches: Batches) -> None:
    """gqaprune's, on the same batches."""
    windows = torch.cat(list(batches))
    measure_perplexity(model, {"text": make_batches(windows, windows, len(batches[0]))})


def keep_gradients(model: PreTrainedModel, batches: Batches) -> None:
    """`Σ |w·g|` of every weight from gradients that are kept."""
    model.requires_grad_(True)
    for batch in batches:
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.grad is not None
            (parameter * parameter.grad).abs().sum()
    model.requires_grad_(False)
    model.zero_grad(set_to_none=True)


def make_scoring(criterion: str, recomputes: bool = False) -> Line:
    """Score every unit that may go."""

    def score(model: PreTrainedModel, batches: Batches) -> None:
        if recomputes:
            model.activation_checkpointing_enable()
        score_units(model, select_blocks(model, PruningConfig()), batches, criterion)
        if recomputes:
            model.activation_checkpointing_disable()

    return score


def make_pruning(**settings: object) -> Line:
    """Everything from a loaded model to pruned weights. The model is cut: give it a copy."""

    def run(model: PreTrainedModel, batches: Batches) -> None:
        prune(model, batches, PruningConfig(**settings))  # type: ignore[arg-type]

    return run


def run_outliers(model: PreTrainedModel, batches: Batches) -> None:
    """Look for units with massive activations; it reads so much text at most."""
    find_outliers(model, select_blocks(model, PruningConfig()), batches)


BY_SIZE = {"criterion": "l2", "allocation": "uniform", "scoring": {"protect_outliers": False}}
"""A choice that reads no text, so that what is timed is what follows it."""
LINES: Mapping[str, Line] = {
    "forward": run_forward,
    "forward of one window": run_forward_of_one,
    "score: fisher": make_scoring("fisher"),
    "score: fisher, activations recomputed": make_scoring("fisher", recomputes=True),
    "score: obs": make_scoring("obs"),
    "element-wise Taylor, gradients kept": keep_gradients,
    "outliers": run_outliers,
    "cut alone": make_pruning(**BY_SIZE, repair={"method": "none"}),
    "cut and least squares": make_pruning(**BY_SIZE, repair={"epochs": 0, "distill_tokens": 0}),
    "cut and repair": make_pruning(**BY_SIZE, repair={"distill_tokens": 0}),
    "prune, least squares alone": make_pruning(repair={"epochs": 0, "distill_tokens": 0}),
    "prune, not distilled": make_pruning(repair={"distill_tokens": 0}),
    "prune as by default": make_pruning(),
    "perplexity": run_perplexity,
    "perplexity, plain loop": run_plain_perplexity,
}
"""Name -> what is timed."""
CUTTING = tuple(name for name in LINES if name.startswith(("cut", "prune")))
WATCHED = tuple(name for name in LINES if name not in CUTTING or name == "prune as by default")
"""Lines whose peak memory is measured: that of pruning as a whole is the largest of its parts'."""


def prepare(options: argparse.Namespace) -> tuple[PreTrainedModel, list[Tensor]]:
    """Model and batches on the device."""
    if options.geometry == "smollm2-135m":
        model, tokenizer = gqaprune.load("smollm2-135m", dtype="float32")
        windows = read_windows(tokenizer, [options.text], options.window, options.windows)
    else:
        model = make_model(GEOMETRIES[options.geometry], torch.bfloat16, options.device)
        windows = make_tokens(model.config, options.windows, options.window)
    model.requires_grad_(False)
    return model.to(options.device).eval(), list(windows.to(options.device).split(options.batch))


def time_lines(model: PreTrainedModel, batches: Batches, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every line, turn by turn."""
    seconds: dict[str, list[float]] = {name: [] for name in options.lines}
    run_forward(model, batches[:1])
    for turn in range(options.turns):
        for name in options.lines:
            own = copy.deepcopy(model) if name in CUTTING else model
            start = read_clock(options.device)
            LINES[name](own, batches)
            seconds[name].append(read_clock(options.device) - start)
            print(f"turn {turn + 1}: {name}: {seconds[name][-1]:.1f} s", flush=True)
    return seconds


def measure_peak(name: str, options: argparse.Namespace) -> int:
    """Bytes that a line needs above the weights; runs in a process of its own."""
    console.quiet = True
    model, batches = prepare(options)
    run_forward(model, [batches[0][:1, :8]])
    before = start_peak(options.device)
    LINES[name](model, batches)
    return read_peak(options.device) - before


def measure_apart(name: str, options: argparse.Namespace) -> int:
    """The same from another process."""
    with start_processes(1) as pool:
        peak = pool.apply(measure_peak, (name, options))
    print(f"peak of {name}: {peak / 2**20:.0f} MiB", flush=True)
    return peak


def build_table(
    seconds: Mapping[str, Sequence[float]], peaks: Mapping[str, int], layers: int, inputs: int
) -> tuple[list[str], list[list[str]]]:
    """Header and rows: lines as measured, what passes of them make the others' schedule, and the floor of memory.

    Args:
        seconds: line -> seconds of each turn.
        peaks: line -> bytes above the weights.
        layers: of the model.
        inputs: bytes of every layer's input for one window.
    """
    medians = {name: statistics.median(turns) for name, turns in seconds.items()}
    if {"forward", "element-wise Taylor, gradients kept", "perplexity, plain loop"} <= medians.keys():
        one = medians["element-wise Taylor, gradients kept"] + medians["perplexity, plain loop"]
        medians[f"GAQ-Aware-Prune's schedule: {layers} of both"] = layers * one
    rows = []
    for name, median in medians.items():
        turns = seconds.get(name)
        spread = f"{min(turns):.1f} to {max(turns):.1f}" if turns else "counted"
        peak = f"{peaks[name] / 2**20:,.0f}" if name in peaks else ""
        rows.append([name, f"{median:.1f}", spread, f"{median / medians['forward']:.2f}", peak])
    if (one := "forward of one window") in peaks:
        floor = f"{(peaks[one] + inputs) / 2**20:,.0f}"
        rows.append([f"floor: {one}, and its input of {layers} layers", "", "counted", "", floor])
    return ["line", "seconds", "lowest to highest", "forwards", "peak MiB above the weights"], rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write it into results/cost.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--geometry", choices=["smollm2-135m", *GEOMETRIES], default="smollm2-135m")
    parser.add_argument("--text", default="embedded", help="calibration corpus of smollm2-135m")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--lines", nargs="+", choices=list(LINES), default=list(LINES))
    parser.add_argument("--results", type=Path, default=HERE / "results/cost.md")
    options = parser.parse_args(arguments)
    console.quiet = True
    peaks = {name: measure_apart(name, options) for name in options.lines if name in WATCHED}
    model, batches = prepare(options)
    seconds, layers = time_lines(model, batches, options), model.config.num_hidden_layers
    inputs = layers * options.window * model.config.hidden_size * model.dtype.itemsize
    text = options.text if options.geometry == "smollm2-135m" else "random tokens"
    about = (
        f"{options.geometry}, {options.windows} windows of {options.window} tokens ({Path(text).name}), batches of "
        f"{options.batch}; medians of {options.turns} turns. {describe_machine(options.device)}."
    )
    table = "\n".join([about, "", *format_table(*build_table(seconds, peaks, layers, inputs))])
    print(table)
    splice(options.results, f"{BEGIN}\n\n{table}\n\n{END}", BEGIN, END, "Speed and memory of pruning")
    return 0


if __name__ == "__main__":
    sys.exit(main())
