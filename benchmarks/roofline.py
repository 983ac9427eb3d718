"""Costs of every stage by arithmetic: forward passes, bytes, memory, and the least seconds on several devices.

    OMP_NUM_THREADS=1 python benchmarks/roofline.py            # the tables of four models: a second for each
    OMP_NUM_THREADS=1 python benchmarks/roofline.py --check    # what really runs on SmolLM2 and on a random Llama

Models are shapes: no weight is loaded. The least time is that of the products at the device's published speed, of the
bytes at its bandwidth, or of the way to the host, whichever is longest; what really runs takes longer. `--check` counts
the operations and the peaks of the allocator on two models that fit here, beside the same formulas.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from counting import Count, Stage, count_flops, measure_peak, prepare_stages
from measuring import GEOMETRIES, describe_machine, make_model, make_tokens
from quality_report import format_table, splice
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, PreTrainedModel

import gqaprune
from gqaprune.commands.device_speed import measure_device, show_time
from gqaprune.common.console import console
from gqaprune.models.architecture import find_blocks
from gqaprune.models.loading import build_without_weights
from gqaprune.planning.costs import peaks
from gqaprune.planning.costs.base import Cost, Text, read_shape, run_model
from gqaprune.planning.costs.curves import cost_repaired_damage
from gqaprune.planning.costs.device import Device
from gqaprune.planning.costs.repair import cost_cut, cost_distillation, cost_predictions
from gqaprune.planning.costs.scoring import cost_perplexity, cost_scores
from gqaprune.planning.costs.stages import list_levels, spread_evenly
from gqaprune.planning.costs.training import cost_recovery_step, cost_sampling
from gqaprune.planning.memory import GIB, read_sizes
from gqaprune.planning.selection import select_blocks
from gqaprune.training.recovery import MODES, RecoveryConfig

HERE = Path(__file__).parent
BEGIN, END = "<!-- roofline:begin -->", "<!-- roofline:end -->"
BEGIN_CHECK, END_CHECK = "<!-- roofline-check:begin -->", "<!-- roofline-check:end -->"

MODELS: dict[str, PretrainedConfig] = {
    "Llama-3-8B": GEOMETRIES["llama-3-8b"],
    "Qwen2.5-7B": GEOMETRIES["qwen2.5-7b"],
    "Mistral-7B": MistralConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=32000,
        max_position_embeddings=32768,
        sliding_window=None,
    ),
    "Llama-3-70B": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=8192,
    ),
}
DEVICES = (
    Device("H100", 989e12, 67e12, 67e12, 3.35e12, 64e9, 80e9),
    Device("A100", 312e12, 19.5e12, 19.5e12, 2.039e12, 32e9, 80e9),
    Device("RTX 4090", 165.2e12, 82.6e12, 1.29e12, 1.008e12, 32e9, 24e9),
)
"""Published speeds of dense products in bfloat16, float32 and float64 (on tensor cores where there are some), of the
memory, and of one direction of PCIe, and bytes of memory. NVIDIA's data sheets of H100 SXM and A100 80GB SXM, and its
white paper on Ada."""
CHECKED = ("SmolLM2-135M", "random Llama")
_FEW_LAYERS = 8
ITEMSIZE = 2
CALIBRATION = Text(128, 512, 4)
EVALUATION = Text(128, 2048, 2)
SAMPLED = Text(256, 256, 64)
TRAINING = Text(4, 512, 4)
"""Texts as by default; of evaluation about as much as the test split of WikiText-2, of training one step."""


@dataclass(frozen=True)
class Row:
    """A stage of one model.

    Args:
        name: of the stage.
        text: that it is counted in forward passes over.
        cost: of it.
        peak: bytes on the device.
    """

    name: str
    text: Text
    cost: Cost
    peak: float


def list_rows(config: PretrainedConfig, memory: float) -> list[Row]:
    """Every stage of a model, with the default settings.

    Args:
        config: of the model.
        memory: bytes of the device, whose part for Gram matrices is as large as there is room; infinite for a CPU.
    """
    model, settings = build_without_weights(config), gqaprune.PruningConfig()
    shape, sizes, repair = read_shape(config, ITEMSIZE), read_sizes(config), settings.repair
    blocks, every, kept = select_blocks(model, settings), find_blocks(model), spread_evenly(model, settings)
    pruned, long = shape.cut(kept, every), peaks.list_long_peaks(sizes, ITEMSIZE, CALIBRATION, TRAINING)
    peak = peaks.peak_perplexity(sizes, ITEMSIZE, EVALUATION)
    rows = [Row("perplexity", EVALUATION, cost_perplexity(shape, EVALUATION), peak)]
    names = {
        "fisher": "fisher, taylor",
        "param_first": "param_first, vectorize",
        "param_mix": "param_second, param_mix",
    }
    names |= {"wanda": "wanda, wifv", "obs": "obs"}
    for criterion, name in names.items():
        peak = peaks.CRITERIA[criterion](sizes, ITEMSIZE, CALIBRATION)
        rows.append(Row(f"scores: {name}", CALIBRATION, cost_scores(shape, CALIBRATION, blocks, criterion), peak))
    room = peaks.find_watch_room(sizes, ITEMSIZE, CALIBRATION, memory)
    cost = cost_scores(shape, CALIBRATION, blocks, settings.criterion, finds_outliers=True, room=room)
    peak = peaks.peak_watched_gates(sizes, ITEMSIZE, CALIBRATION, memory)
    rows.append(Row(f"scores: {settings.criterion}, outliers", CALIBRATION, cost, peak))
    cost = cost_repaired_damage(shape, CALIBRATION, blocks, list_levels(model, settings), repair.holdout)
    peak = peaks.peak_curves(sizes, ITEMSIZE, CALIBRATION, repair.holdout)
    rows.append(Row("curves", CALIBRATION, cost, peak))
    unrefined = replace(repair, epochs=0)
    fitted, whole = (
        cost_cut(shape, CALIBRATION, every, kept, own, measures_damage=True) for own in (unrefined, repair)
    )
    # Layers that lose nothing are refitted, too, and are the widest.
    peak = peaks.peak_repair(sizes, ITEMSIZE, CALIBRATION, repair.holdout, sizes.channel_range[1], memory)
    distilled = cost_predictions(shape, CALIBRATION, repair) + cost_distillation(pruned, CALIBRATION, repair)
    rows += [
        Row("cut, least squares", CALIBRATION, fitted, peak),
        Row("refinement", CALIBRATION, whole + -1 * fitted, peak),
        Row("distillation", CALIBRATION, distilled, long["repair, distillation"]),
        Row("sampling", SAMPLED, cost_sampling(shape, SAMPLED), peaks.peak_sampling(sizes, ITEMSIZE, SAMPLED)),
    ]
    for mode in MODES[1:]:
        cost = cost_recovery_step(pruned, TRAINING, mode, RecoveryConfig.lora_rank, teacher=shape)
        rows.append(Row(f"a step: {mode}", TRAINING, cost, long[f"recovery, {mode}"]))
    return rows


def describe_model(name: str, config: PretrainedConfig, devices: Sequence[Device]) -> list[str]:
    """The table of a model, as lines of Markdown; where devices of different memory differ, a number for each."""
    shape, lines = read_shape(config, ITEMSIZE), []
    rows = {memory: list_rows(config, memory) for memory in dict.fromkeys(device.memory for device in devices)}
    for own in zip(*rows.values(), strict=True):
        of_memory = dict(zip(rows, own, strict=True))
        times = []
        for device in devices:
            row = of_memory[device.memory]
            fits = row.peak < device.memory
            times.append(show_time(device.find_least_seconds(row.cost)) + ("" if fits else " ×"))
        cells = [
            [f"{row.cost.all_flops / run_model(shape, row.text).flops:.2f}" for row in own],
            [f"{row.cost.bytes_moved / 1e9:,.0f}" for row in own],
            [f"{row.cost.host_bytes / 1e9:,.1f}" for row in own],
            [f"{row.peak / GIB:,.1f}" for row in own],
        ]
        lines.append([own[0].name, *(" / ".join(each if len(set(each)) > 1 else each[:1]) for each in cells), *times])
    parameters = read_sizes(config).parameters / 1e9
    header = ["stage", "forward passes", "GB moved", "GB to host", "peak, GiB", *(device.name for device in devices)]
    return [f"**{name}**, {parameters:.2f} billion parameters in bfloat16.", "", *format_table(header, lines), ""]


def describe_devices(devices: Sequence[Device]) -> list[str]:
    """What the devices can do, as a table."""
    lines = []
    for device in devices:
        speeds = device.flops, device.single_flops, device.double_flops
        link = "–" if device.host_bandwidth == float("inf") else f"{device.host_bandwidth / 1e9:,.0f}"
        size = "–" if device.memory == float("inf") else f"{device.memory / 1e9:.0f}"
        lines.append(
            [device.name, *(f"{speed / 1e12:,.3g}" for speed in speeds), f"{device.bandwidth / 1e9:,.0f}", link, size]
        )
    return format_table(
        ["device", "bfloat16, TFLOP/s", "float32", "float64", "memory, GB/s", "host, GB/s", "memory, GB"], lines
    )


def check(model: PreTrainedModel, windows: int, length: int, chosen: Callable[[str], bool]) -> dict[str, list[str]]:
    """Count what runs, beside the formula.

    Args:
        model: in float32.
        windows: to read, two at a time.
        length: tokens of each.
        chosen: whether a stage is counted.

    Returns:
        By stage, operations and how far the formula is off, and likewise the peak.
    """
    cells = {}
    for stage in prepare_stages(model, make_tokens(model.config, windows, length), 2):
        if chosen(stage.name):
            cells[stage.name] = check_stage(stage, 4 * model.num_parameters())
            print(stage.name, *cells[stage.name], sep=" | ", flush=True)
    return cells


def check_stage(stage: Stage, weights: int) -> list[str]:
    """Operations that ran and the allocator's peak, and how far the formulas are off.

    Args:
        stage: what is to run.
        weights: bytes of the model's weights.
    """
    counts = list[Count]()
    measured = measure_peak(lambda: counts.append(count_flops(stage.run))) + (0 if stage.copies else weights)
    products, formula = counts[0].seen + counts[0].unseen, stage.cost.all_flops
    if stage.name.startswith("cut"):  # of whose float64 work the data says how much runs
        products, formula = counts[0].seen, stage.cost.flops + stage.cost.single_flops
    cells = [f"{products / 1e9:,.2f}", f"{formula / products - 1:+.1%}"]
    if stage.peak is None:
        return [*cells, "–", "–"]
    return [*cells, f"{measured / 2**20:,.0f}", f"{stage.peak / measured - 1:+.1%}"]


def is_checked(name: str, layers: int, every: bool, named: tuple[str, ...] = ("",)) -> bool:
    """Whether a stage is checked.

    Args:
        name: of the stage.
        layers: of the model.
        every: check stages, too, that pass a model of many layers once for every block or layer.
        named: how names begin of those to check.
    """
    if not name.startswith(named):
        return False
    alike = ("taylor", "vectorize", "param_second", "wifv", "middle", "lora+distill", "cut, least")
    slow = (
        ("importance", "curves", "cut, refinement, damage") if layers > _FEW_LAYERS else ("importance", "curves, gated")
    )
    return not any(other in name for other in alike) and (every or not name.startswith(slow))


def make_wide() -> PreTrainedModel:
    """A wider random Llama of few layers."""
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2304,
        num_hidden_layers=4,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=8192,
        max_position_embeddings=1024,
    )
    return make_model(config, torch.float32, "cpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """Work out the tables, or count, and write them into results/roofline.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--check", action="store_true", help="count what runs instead")
    parser.add_argument("--all", action="store_true", help="check slow stages of deep models, too: minutes")
    parser.add_argument("--stages", nargs="+", default=[""], help="check those whose names begin so")
    parser.add_argument("--windows", type=int, default=4, help="of the check, two at a time")
    parser.add_argument("--length", type=int, default=64, help="tokens of each")
    parser.add_argument(
        "--checked", nargs="+", choices=("SmolLM2-135M", "random Llama"), default=["SmolLM2-135M", "random Llama"]
    )
    parser.add_argument("--results", type=Path, default=HERE / "results/roofline.md")
    options = parser.parse_args(arguments)
    console.quiet = True
    if options.check:
        _write_check(options)
        return 0
    own = measure_device(torch.device("cpu"), torch.bfloat16, seconds=2.0)
    devices = [*DEVICES, replace(own, name="this CPU")]
    lines = [*describe_devices(devices), "", f"This CPU: {describe_machine('cpu')}.", ""]
    for name in options.models:
        lines += describe_model(name, MODELS[name], devices)
    print("\n".join(lines))
    splice(options.results, "\n".join([BEGIN, "", *lines, END]), BEGIN, END, "The least that each stage takes")
    return 0


def _write_check(options: argparse.Namespace) -> None:
    makers = {"SmolLM2-135M": lambda: gqaprune.load("smollm2-135m")[0], "random Llama": make_wide}
    cells: dict[str, dict[str, list[str]]] = {}
    about = []
    for name in options.checked:
        model = makers[name]()
        layers = model.config.num_hidden_layers
        chosen = partial(is_checked, layers=layers, every=options.all, named=tuple(options.stages))
        cells[name] = check(model, options.windows, options.length, chosen)
        about.append(f"{name} has {model.num_parameters() / 1e6:,.0f} million parameters")
    header = [f"{name}: {what}" for name in cells for what in ("GFLOP", "formula", "MiB", "formula")]
    stages = max(cells.values(), key=len)
    lines = [[stage, *(cell for own in cells.values() for cell in own.get(stage, ["–"] * 4))] for stage in stages]
    text = f"{'; '.join(about)}, in float32; {options.windows} windows of {options.length} tokens. "
    text += f"torch {torch.__version__}."
    section = "\n".join([BEGIN_CHECK, "", text, "", *format_table(["stage", *header], lines), "", END_CHECK])
    splice(options.results, section, BEGIN_CHECK, END_CHECK, "The formulas beside what runs")


if __name__ == "__main__":
    sys.exit(main())
