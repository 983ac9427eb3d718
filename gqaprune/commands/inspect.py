"""`gqaprune inspect`: what a model holds and allows, what can go wrong, and what work on it needs."""

import json as json_format
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub import constants
from rich.table import Table
from rich.text import Text as ShownText
from transformers import PretrainedConfig

from gqaprune.commands.advice import write_advice
from gqaprune.commands.bos_check import check_bos
from gqaprune.commands.checkup import (
    build_layers_table,
    check_layers,
    correct_by_weights,
    find_wrong_tensors,
    read_plan_of,
)
from gqaprune.commands.device_speed import measure_device, read_memory
from gqaprune.commands.reach import NAMES, Reach, measure_reach
from gqaprune.commands.risks import list_risks
from gqaprune.commands.stages_table import build_stages_table
from gqaprune.common.atomic_files import write_atomically
from gqaprune.common.console import SafeConsole
from gqaprune.data.windows import read_windows
from gqaprune.models.architecture import find_blocks, read_context, read_geometry
from gqaprune.models.dtypes import DTYPES, check_dtype, name_dtype, read_dtype
from gqaprune.models.hub import check_hub
from gqaprune.models.loading import build_without_weights, load
from gqaprune.models.loading_guard import guard_loading
from gqaprune.models.sources import load_config, pin
from gqaprune.planning.config import PruningConfig
from gqaprune.planning.costs.base import Text
from gqaprune.planning.costs.stages import StageCost, cost_stages
from gqaprune.planning.memory import GIB, PLACES, ModelSizes, estimate_memory, read_sizes
from gqaprune.planning.stages import Work
from gqaprune.scoring.outliers import Outliers, find_outliers
from gqaprune.training.recovery import RecoveryConfig

_WINDOW = 512
"""Tokens of a calibration window, as by default."""


def inspect(
    model: str,
    dtype: str = "auto",
    devices: int = 8,
    tokens: int = 2048,
    calibration_tokens: int = 65536,
    gradient_checkpointing: bool = False,
    outliers: bool = False,
    write_config: str | None = None,
    json: bool = False,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> None:
    """Print what a model holds, which rates it allows, its risks, and the memory and time that work on it needs.

    Time is that of pruning with the default settings on this machine: forward passes by arithmetic, at the speed of
    matrix products that are tried for a moment.

    Of a pruned checkpoint also what each layer lost, whether it keeps its ratio, and whether its tensors are those of
    its config. Weights are loaded for `outliers`, and where the tokenizer and the windows of `data.bos` do not agree
    about the beginning-of-text token and the model has at most 2 billion parameters: a few windows are then measured
    with and without it.

    Args:
        model: a folder, a `.gguf` file, a hub name, or `smollm2-135m`.
        dtype: type that the weights are to have, as `model.dtype`; `auto` is the config's own, else float32.
        devices: that DDP and FSDP spread over.
        tokens: of a micro-batch, all windows together, in training and in calibration.
        calibration_tokens: of all calibration windows together.
        gradient_checkpointing: memory with `model.gradient_checkpointing`.
        outliers: load the weights and look for units that carry massive activations, on the embedded text.
        write_config: file to write a configuration to, that is right for this model to begin with.
        json: print one JSON object instead of tables.
        trust_remote_code: run code that comes with the model. Pruned checkpoints do not need it here.
        revision: branch, tag or commit of a model on the hub.

    Raises:
        ValueError: if there is no such model, or a number is out of its bounds.
    """
    for name, value in (("devices", devices), ("tokens", tokens), ("calibration_tokens", calibration_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    check_dtype(dtype)
    model = pin(model, revision)
    config, folder = load_config(model, trust_remote_code), Path(model) if Path(model).is_dir() else None
    with guard_loading("model", model):
        if folder is not None:
            correct_by_weights(folder, config, trust_remote_code)
        geometry, sizes = read_geometry(config), read_sizes(config, trust_remote_code)
        kind = (read_dtype(config) or torch.float32) if dtype == "auto" else DTYPES[dtype]
        assert isinstance(kind, torch.dtype)
        reach = measure_reach(build_without_weights(config, trust_remote_code))
        found = look_for_outliers(model, trust_remote_code) if outliers else None
        outside = 1 - sizes.decoder_parameters / sizes.parameters
        risks = list_risks(config, geometry, outside, name_dtype(kind), found)
        bos = check_bos(model, config, sizes.parameters, trust_remote_code)
        if bos is not None and bos.matters:
            risks.insert(0, bos.describe())
        plan = read_plan_of(folder) if folder is not None else None
        wrong = find_wrong_tensors(folder, config, trust_remote_code) if folder is not None else {}
        checks = check_layers(config, plan, wrong) if folder is not None else []
    type_name, device = name_dtype(kind), torch.device("cuda" if torch.cuda.is_available() else "cpu")
    stages = cost_default_stages(
        config, calibration_tokens, tokens, kind.itemsize, read_memory(device), trust_remote_code
    )
    bytes_needed = estimate_memory(sizes, kind.itemsize, devices, tokens, calibration_tokens, gradient_checkpointing)
    weights = {name: sizes.parameters * of.itemsize for name, of in DTYPES.items() if isinstance(of, torch.dtype)}
    cache = geometry.kv_cache_bytes_per_token(kind.itemsize)
    if write_config is not None:
        own = name_dtype(read_dtype(config) or "bfloat16")
        check_hub()
        has_hub = not constants.HF_HUB_OFFLINE
        advice = write_advice(model, geometry, sizes.parameters, own, read_context(config), reach, risks, has_hub)
        write_atomically(Path(write_config), advice.encode())
    if json:
        memory = {work: {place: n and n / GIB for place, n in row.items()} for work, row in bytes_needed.items()}
        facts = {"model": model, "dtype": type_name, "devices": devices, "tokens": tokens}
        facts |= {"calibration_tokens": calibration_tokens, "gradient_checkpointing": gradient_checkpointing}
        facts |= {**asdict(sizes), "kv_cache_bytes_per_token": cache}
        facts |= {"reach": [asdict(one) for one in reach], "risks": risks, "weight_bytes": weights}
        facts |= {"layer_checks": [asdict(check) for check in checks], "wrong_outside": wrong.get(None, [])}
        facts |= {"memory_gib": memory, "bos": bos and asdict(bos), "stages": [asdict(stage) for stage in stages]}
        print(json_format.dumps(facts, indent=1))
        return
    console = SafeConsole()
    console.print(build_sizes_table(model, sizes, weights, cache))
    console.print(build_reach_table(reach))
    for one in reach:
        console.print(one.describe_step())
    if plan is not None or not geometry.is_uniform or wrong:
        console.print(build_layers_table(checks, plan.model if plan is not None else ""))
    for sentence in wrong.get(None, ()):
        console.print(ShownText("wrong:", "red"), sentence)
    for risk in risks:
        console.print(ShownText("risk:", "yellow"), risk)
    if bos is not None and not bos.matters:
        console.print(f"BOS: {bos.describe()}")
    caption = f"{tokens:,} tokens a micro-batch, {calibration_tokens:,} of calibration, weights in {type_name}"
    caption += ", activations recomputed" if gradient_checkpointing else ""
    console.print(build_memory_table(bytes_needed, devices, caption))
    console.print(build_stages_table(stages, measure_device(device, kind), about="with the default settings; "))
    if write_config is not None:
        console.print(f"configuration  {write_config}")


def cost_default_stages(
    config: PretrainedConfig,
    calibration_tokens: int,
    tokens: int,
    itemsize: int,
    memory: float = float("inf"),
    trust_remote_code: bool = False,
) -> list[StageCost]:
    """Costs of pruning with the default settings.

    Args:
        config: of the model.
        calibration_tokens: of all calibration windows together.
        tokens: of a micro-batch.
        itemsize: bytes of a weight.
        memory: bytes that the GPU has free; infinite for a CPU.
        trust_remote_code: run code that comes with the model.
    """
    model = build_without_weights(config, trust_remote_code)
    window = min(_WINDOW, read_context(config), tokens, calibration_tokens)
    text = Text(calibration_tokens // window, window, max(1, tokens // window))
    return cost_stages(model, PruningConfig(), Work(text), RecoveryConfig(), itemsize, memory)


def look_for_outliers(model: str, trust_remote_code: bool = False) -> Outliers:
    """Load a model and find the units that carry massive activations on the embedded text."""
    loaded, tokenizer = load(model, trust_remote_code=trust_remote_code)
    windows = read_windows(tokenizer, ["embedded"], window=min(512, read_context(loaded.config)), count=16)
    return find_outliers(loaded, find_blocks(loaded), list(windows.split(2)))


def build_sizes_table(model: str, sizes: ModelSizes, weights: Mapping[str, int], cache: int) -> Table:
    """One row per quantity."""
    table = Table(title=f"{model}: {sizes.family}", title_justify="left", show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    for label, value in (
        ("parameters", f"{sizes.parameters:,}"),
        ("decoder parameters", f"{sizes.decoder_parameters:,}"),
        ("layers", str(sizes.layers)),
        ("query heads", show_range(sizes.query_head_range)),
        ("KV heads", show_range(sizes.kv_head_range)),
        ("query heads per KV head", show_range(sizes.ratio_range)),
        ("head_dim", str(sizes.head_dim)),
        ("MLP channels", show_range(sizes.channel_range)),
        ("KV-cache bytes/token", f"{cache:,}"),
        *((f"weights in {name}", f"{size / 1e6:,.1f} MB") for name, size in weights.items()),
    ):
        table.add_row(label, value)
    return table


def build_reach_table(reach: Sequence[Reach]) -> Table:
    """One row per kind of block, and one for both."""
    caption = (
        "shares of the decoder layers' parameters, one unit staying in each block; the default leaves the ends whole"
    )
    table = Table(title="rates that are reachable", caption=caption, caption_style="dim", title_justify="left")
    for name in ("", "parameters/unit", "parameters/block", "by default", "in all layers"):
        table.add_column(name, justify="right" if name else "left", overflow="fold")
    for one in reach:
        block = one.units * one.unit_parameters
        shares = f"{one.reachable:.1%}", f"{one.reachable_anywhere:.1%}"
        table.add_row(f"{one.kind}: {NAMES[one.kind]}s", f"{one.unit_parameters:,}", f"{block:,}", *shares)
    if len(reach) > 1:
        total = sum(one.reachable for one in reach), sum(one.reachable_anywhere for one in reach)
        table.add_row("both", "", "", *(f"{share:.1%}" for share in total))
    return table


def build_memory_table(
    bytes_needed: Mapping[str, Mapping[str, float | None]], devices: int, caption: str = ""
) -> Table:
    """One row per work, one column per place, in GiB."""
    table = Table(
        title="memory per device, GiB (estimated)", caption=caption, caption_style="dim", title_justify="left"
    )
    table.add_column("", no_wrap=True)
    for place in PLACES:
        table.add_column(
            f"{place}, {devices}" if place in ("ddp", "fsdp", "sharded") else place, justify="right", overflow="fold"
        )
    for work, row in bytes_needed.items():
        table.add_row(work, *("–" if row[place] is None else f"{(row[place] or 0) / GIB:,.2f}" for place in PLACES))
    return table


def show_range(counts: tuple[int, int]) -> str:
    """Smallest and largest in words, once where they are equal."""
    return f"{counts[0]:,}" if counts[0] == counts[1] else f"{counts[0]:,} – {counts[1]:,}"
