"""Memory and seconds of `obs` and of repair by least squares on one MLP as wide as a large model's.

    OMP_NUM_THREADS=1 python benchmarks/wide.py                        # Llama-3-8B's MLP
    OMP_NUM_THREADS=1 python benchmarks/wide.py --hidden 64 --width 160 --tokens 256

One decoder layer of random weights reads windows of random tokens, one at a time. `obs` scores all channels; repair
cuts 20 % of them away and fits the others with the default's ridges, without refinement. Each has a process of its own,
whose memory is looked at 200 times a second: what it grows beyond the weights, its own and pages of mapped files apart.
On a GPU its own is torch's tensors there.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_context
from pathlib import Path

import torch
from measuring import describe_machine, make_model, make_tokens, watch_memory
from quality_report import format_table, splice
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

import gqaprune
from gqaprune.commands.speed import read_clock, read_peak, start_peak
from gqaprune.common.console import console
from gqaprune.models.architecture import find_blocks
from gqaprune.plan import KeptUnits, PruningPlan
from gqaprune.planning.selection import keep_everything
from gqaprune.scoring.scores import score_units
from gqaprune.surgery.repair import apply_plan_with_repair

HERE = Path(__file__).parent
BEGIN, END = "<!-- wide:begin -->", "<!-- wide:end -->"
WINDOW = 256


def score(model: PreTrainedModel, batches: Sequence[Tensor]) -> None:
    """Statistics and scores of `obs`."""
    blocks = [block for block in find_blocks(model) if block.key.kind == "mlp"]
    score_units(model, blocks, batches, "obs")


def repair(model: PreTrainedModel, batches: Sequence[Tensor]) -> None:
    """Cut, and least squares."""
    whole = keep_everything(model)
    kept = range(round(0.8 * whole.geometry.channels[0]))
    plan = PruningPlan(whole.geometry, (KeptUnits(whole.layers[0].groups, tuple(kept)),))
    apply_plan_with_repair(model, plan, batches, gqaprune.PruningConfig(repair={"epochs": 0}).repair)


PARTS: Mapping[str, Callable[[PreTrainedModel, Sequence[Tensor]], None]] = {
    "scores of obs": score,
    "cut and least squares": repair,
}
"""Name -> what is measured."""


def measure(part: str, options: argparse.Namespace) -> tuple[int, int, float]:
    """Bytes beyond the weights, of the process or of the GPU, and in mapped files; seconds."""
    console.quiet = True
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.width,
        num_hidden_layers=1,
        num_attention_heads=options.hidden // 32,
        num_key_value_heads=options.hidden // 32,
        vocab_size=256,
    )
    model = make_model(config, getattr(torch, options.dtype), options.device).requires_grad_(False)
    batches = make_tokens(config, options.tokens // WINDOW, WINDOW).split(1)
    with torch.no_grad():
        model(input_ids=batches[0][:, :8].to(options.device))  # what only the first call needs
    if options.device == "cuda":
        before = start_peak("cuda")
    with watch_memory() as growth:
        start = read_clock(options.device)
        PARTS[part](model, batches)
        seconds = read_clock(options.device) - start
    own = read_peak("cuda") - before if options.device == "cuda" else growth["RssAnon"]
    return own, growth["RssFile"], seconds


def describe(found: Mapping[str, tuple[int, int, float]], options: argparse.Namespace) -> str:
    """The table, as Markdown."""
    own = "tensors of torch on the GPU" if options.device == "cuda" else "memory of the process, anonymous"
    about = (
        f"One decoder layer, hidden size {options.hidden:,}, {options.width:,} channels, random {options.dtype} "
        f"weights; {options.tokens:,} random tokens in windows of {WINDOW}. {describe_machine(options.device)}. "
        f"Peaks beyond the weights: {own}; and pages of mapped files, which the system can write out."
    )
    header = ["part", "peak MB", "MB of mapped files", "seconds"]
    rows = [
        [part, f"{own / 1e6:,.0f}", f"{mapped / 1e6:,.0f}", f"{seconds:,.1f}"]
        for part, (own, mapped, seconds) in found.items()
    ]
    return "\n".join([about, "", *format_table(header, rows)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, write it into results/large_models.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=4096, help="a multiple of 32")
    parser.add_argument("--width", type=int, default=14336, help="channels")
    parser.add_argument("--tokens", type=int, default=2048, help=f"a multiple of {WINDOW}")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--results", type=Path, default=HERE / "results/large_models.md")
    options = parser.parse_args(arguments)
    found = {}
    for part in options.parts:
        with get_context("spawn").Pool(1) as pool:
            found[part] = pool.apply(measure, (part, options))
        print(part, found[part], flush=True)
    table = describe(found, options)
    print(table)
    splice(options.results, f"{BEGIN}\n\n{table}\n\n{END}", BEGIN, END, "A wide MLP in bounded memory")
    return 0


if __name__ == "__main__":
    sys.exit(main())
