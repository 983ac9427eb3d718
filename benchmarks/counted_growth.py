"""How counted work grows: operations of scores, curves and repair by tokens, layers and ranks, and bytes between ranks.

    OMP_NUM_THREADS=1 python benchmarks/counted_growth.py    # writes a table into results/cost.md

Nothing is timed, so that other work on the machine does not matter. Ranks are processes that gloo connects. A
collective's bytes are those of the tensor that it is given.
"""

import argparse
import copy
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from counting import HOLDOUT, count_flops, make_levels
from measuring import make_model, make_tokens
from quality_report import format_table, splice
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from gqaprune.common.console import console
from gqaprune.models.architecture import Block, find_blocks
from gqaprune.plan import KeptUnits, PruningPlan
from gqaprune.planning.memory import count_gram
from gqaprune.planning.selection import keep_everything
from gqaprune.scoring.repaired_damage import measure_repaired_damage
from gqaprune.scoring.scores import score_units
from gqaprune.surgery.refinement import STEP_TOKENS
from gqaprune.surgery.repair import apply_plan_with_repair, choose_held_out
from gqaprune.surgery.repair_config import RepairConfig

HERE = Path(__file__).parent
BEGIN, END = "<!-- counted-growth:begin -->", "<!-- counted-growth:end -->"
REPAIR = RepairConfig(products="float32", ridges=(0.1,), epochs=2, distill_tokens=0)
"""One ridge to choose from: how many of several are tried depends on the data."""
WINDOW, BATCH, HIDDEN, CHANNELS = 64, 4, 64, 192
STAGES = ("scores", "curves", "repair")


@dataclass(frozen=True)
class Size:
    """How large a model is, how much text it reads, and on how many ranks.

    Args:
        layers: decoder layers.
        tokens: of calibration text.
        ranks: that share it out.
    """

    layers: int = 4
    tokens: int = 5120
    ranks: int = 1


@dataclass(frozen=True)
class Work:
    """What one rank does in a stage.

    Args:
        products: operations of products of matrices.
        solvers: operations of factors and solutions, in float64.
        summed: bytes that it gives to sums over ranks.
        copied: bytes that rank 0 sends to the others.
    """

    products: float
    solvers: float
    summed: int = 0
    copied: int = 0


def list_stages(size: Size) -> tuple[dict[str, Callable[[], object]], dict[str, float]]:
    """What each stage runs on a random Llama, and the bytes of what ranks have to sum in it once."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=CHANNELS,
        num_hidden_layers=size.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=256,
        max_position_embeddings=WINDOW,
    )
    model = make_model(config, torch.float32, "cpu")
    batches = make_tokens(config, size.tokens // WINDOW, WINDOW).split(BATCH)
    blocks, held_out = find_blocks(model), choose_held_out(len(batches), HOLDOUT)
    scores, levels, plan = score_units(model, blocks, [], "l2"), make_levels(blocks), _make_plan(model)
    stages: dict[str, Callable[[], object]] = {
        "scores": lambda: score_units(model, blocks, batches, "fisher+obs"),
        "curves": lambda: measure_repaired_damage(model, blocks, scores, {}, levels, batches, held_out),
        "repair": lambda: apply_plan_with_repair(copy.deepcopy(model), plan, batches, REPAIR),
    }
    fitted = size.tokens - len(held_out) * BATCH * WINDOW
    return stages, _count_least(blocks, fitted)


def _make_plan(model: PreTrainedModel) -> PruningPlan:
    """A plan without a quarter of each MLP's channels."""
    whole = keep_everything(model)
    layers = tuple(KeptUnits(units.groups, units.channels[CHANNELS // 4 :]) for units in whole.layers)
    return PruningPlan(whole.geometry, layers)


def _count_least(blocks: Sequence[Block], fitted: int) -> dict[str, float]:
    """Bytes of what all ranks' text adds up to: Gram matrices, cross moments, and the gradients of each step."""
    kept = CHANNELS - CHANNELS // 4
    inputs = [block.output.in_features for block in blocks]
    refitted = [kept if block.key.kind == "mlp" else block.output.in_features for block in blocks[1:]]
    steps = REPAIR.epochs * max(1, fitted // STEP_TOKENS)
    trained = sum(4.0 * 3 * HIDDEN * kept * steps for block in blocks if block.key.kind == "mlp")
    judged = sum(count_gram(block.output.in_features) for block in blocks if block.key.kind == "attention")
    grams = sum(map(count_gram, inputs))
    moments = sum(2 * (count_gram(columns) + 8 * HIDDEN * columns) for columns in refitted)
    return {"scores": grams, "curves": grams + judged, "repair": moments + trained}


@contextmanager
def _count_bytes() -> Any:
    """Count the bytes that collectives are given, by name."""
    counts = {"all_reduce": 0, "broadcast": 0}
    functions = {name: getattr(dist, name) for name in counts}

    def wrap(name: str) -> Callable[..., Any]:
        def call(tensor: Tensor, *arguments: Any, **keywords: Any) -> Any:
            counts[name] += tensor.nbytes
            return functions[name](tensor, *arguments, **keywords)

        return call

    for name in counts:
        setattr(dist, name, wrap(name))
    try:
        yield counts
    finally:
        for name, function in functions.items():
            setattr(dist, name, function)


def count_work(size: Size, stages: Sequence[str] = STAGES) -> list[dict[str, Work]]:
    """Count what each rank does in each stage."""
    if size.ranks == 1:
        return [_count_stages(size, stages)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["gqaprune.cli.run", "matplotlib.figure", "peft"])  # all that takes long
    with tempfile.TemporaryDirectory() as folder:
        queue = context.Queue()
        arguments = (size, stages, folder, queue)
        processes = [context.Process(target=_be_rank, args=(rank, *arguments)) for rank in range(size.ranks)]
        for process in processes:
            process.start()
        found = dict(queue.get(timeout=1800) for _ in processes)
        for process in processes:
            process.join()
    return [found[rank] for rank in range(size.ranks)]


def _be_rank(rank: int, size: Size, stages: Sequence[str], folder: str, queue: Any) -> None:
    console.quiet = True
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size.ranks)
    queue.put((rank, _count_stages(size, stages)))
    dist.barrier()
    dist.destroy_process_group()


def _count_stages(size: Size, names: Sequence[str]) -> dict[str, Work]:
    torch.set_num_threads(1)
    stages, _ = list_stages(size)
    found = {}
    for name in names:
        with _count_bytes() as counts:
            count = count_flops(stages[name])
        found[name] = Work(count.seen, count.unseen, counts["all_reduce"], counts["broadcast"])
    return found


def measure_bend(works: Sequence[Work]) -> float:
    """How far work at three evenly spaced sizes is from a straight line: the second step over the first, less 1."""
    first, second, third = (work.products + work.solvers for work in works)
    return (third - second) / (second - first) - 1


def describe(base: Size) -> str:
    """The tables, as Markdown."""
    tokens, layers = (
        [count_work(replace(base, **{axis: number * getattr(base, axis) // 2}))[0] for number in (1, 2, 3)]
        for axis in ("tokens", "layers")
    )
    bends = {
        axis: ", ".join(f"{stage} {measure_bend([each[stage] for each in own]):+.1%}" for stage in STAGES)
        for axis, own in (("tokens", tokens), ("layers", layers))
    }
    about = f"A random Llama, {base.layers} layers, {HIDDEN} wide, {CHANNELS} channels, {base.tokens:,} tokens. Off a "
    about += "straight line: " + "; ".join(f"by {axis}, {bend}" for axis, bend in bends.items()) + "."
    return "\n".join([about, "", *_describe_ranks(base)])


def _describe_ranks(base: Size) -> list[str]:
    alone = count_work(base)[0]
    _, least = list_stages(base)
    lines = []
    for ranks in (2, 4):
        for stage, works in _transpose(count_work(replace(base, ranks=ranks))).items():
            ideal = alone[stage].products / ranks
            all_ideal = (alone[stage].products + alone[stage].solvers) / ranks
            most = max(work.products for work in works)
            every = max(work.products + work.solvers for work in works)
            own = works[0]
            cells = f"{most / ideal:.2f}", f"{every / all_ideal:.2f}"
            sums = f"{own.summed / 1e6:.2f}", f"{own.copied / 1e6:.2f}", f"{least[stage] / 1e6:.2f}"
            lines.append([stage, str(ranks), *cells, *sums, f"{own.summed / least[stage]:.2f}"])
    header = ["stage", "ranks", "products / ideal", "all / ideal", "MB summed", "MB copied", "least summed", "ratio"]
    return format_table(header, lines)


def _transpose(ranks: Sequence[Mapping[str, Work]]) -> dict[str, list[Work]]:
    return {stage: [rank[stage] for rank in ranks] for stage in ranks[0]}


def main() -> int:
    """Count, and write the tables into results/cost.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=HERE / "results/cost.md")
    options = parser.parse_args()
    console.quiet = True
    table = describe(Size())
    print(table)
    splice(options.results, f"{BEGIN}\n\n{table}\n\n{END}", BEGIN, END, "How counted work grows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
