"""`--dry_run`: what a run would do, hold and take, from the model's config and the settings alone."""

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from transformers import PreTrainedModel

from gqaprune.commands.device_speed import measure_device
from gqaprune.commands.stages_table import build_stages_table
from gqaprune.models.architecture import read_geometry
from gqaprune.models.dtypes import name_dtype
from gqaprune.placement.model_source import ModelSource
from gqaprune.planning.config import PruningConfig
from gqaprune.planning.costs.stages import cost_stages
from gqaprune.planning.memory import GIB, ModelSizes, estimate_memory, read_sizes
from gqaprune.planning.preflight import check_reachable
from gqaprune.planning.selection import read_budget, select_blocks
from gqaprune.planning.stages import Work
from gqaprune.planning.target import resolve_target
from gqaprune.training.recovery import RecoveryConfig


def describe_dry_run(
    source: ModelSource,
    pruning: PruningConfig,
    work: Work,
    recovery: RecoveryConfig,
    device: torch.device,
    window: int,
    devices: int = 1,
) -> RenderableType:
    """What a run would do, as tables.

    Args:
        source: the dense model.
        pruning: what is removed and how.
        work: what is read and trained.
        recovery: how it is trained.
        device: that it would run on, whose speed is tried for a moment.
        window: tokens of a micro-batch.
        devices: how many there are.

    Raises:
        ValueError: if the budget cannot be met.
    """
    config, model = source.read_config(), source.build_in_its_type()
    sizes = read_sizes(config, source.trust_remote_code)
    pruning = resolve_target(model, pruning)
    dtype = source.loaded_dtype
    left = sizes.parameters
    groups: int | None = 0
    if pruning.removes_something:
        blocks, budget = select_blocks(model, pruning), read_budget(model, pruning)
        check_reachable(blocks, budget, pruning)
        left -= round(budget.rate * budget.base_parameters)
        groups = round(pruning.kv_rate * budget.kv_heads) if pruning.kv_rate else None
        if groups is None and (pruning.attention_share == 0 or pruning.granularity == "query"):
            groups = 0
    geometry = read_geometry(config)
    cache = geometry.kv_cache_bytes_per_token(dtype.itemsize)
    kept = 1 - (groups or 0) / sizes.kv_heads
    table = Table(title=f"{sizes.family}: what would be left", title_justify="left")
    for name in ("", "dense", "pruned"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    table.add_row("parameters", f"{sizes.parameters:,}", f"{left:,} ({left / sizes.parameters - 1:.1%})")
    size = dtype.itemsize / 1e9
    table.add_row(f"weights in {name_dtype(dtype)}", f"{sizes.parameters * size:.2f} GB", f"{left * size:.2f} GB")
    for tokens in (8192, 32768):
        dense = cache * tokens / 1e6
        own = "the allocation chooses" if groups is None else f"{dense * kept:,.1f} MB"
        table.add_row(f"KV cache, {tokens:,} tokens", f"{dense:,.1f} MB", own)
    return Group(
        table,
        _list_memory(sizes, dtype, work, window, devices),
        _list_work(model, pruning, work, recovery, dtype, device),
    )


def _list_memory(sizes: ModelSizes, dtype: torch.dtype, work: Work, window: int, devices: int) -> Table:
    needed = estimate_memory(sizes, dtype.itemsize, devices, window, work.calibration.tokens)
    table = Table(title="memory, on one device", title_justify="left", show_header=False)
    for name, row in needed.items():
        if (own := row["one device"]) is not None:
            table.add_row(name, f"{own / GIB:.2f} GiB")
    return table


def _list_work(
    model: PreTrainedModel,
    pruning: PruningConfig,
    work: Work,
    recovery: RecoveryConfig,
    dtype: torch.dtype,
    device: torch.device,
) -> Table:
    speeds = measure_device(device, dtype)
    stages = cost_stages(model, pruning, work, recovery, dtype.itemsize, speeds.memory)
    return build_stages_table(stages, speeds, is_uncounted=work.trains and work.training is None)
