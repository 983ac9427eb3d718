"""The dtype in which repair multiplies when it trains: the config's, or one chosen once for a whole run."""

from dataclasses import replace

import torch

from gqaprune.common.console import console
from gqaprune.common.cpu import is_faster_in_bfloat16
from gqaprune.common.distributed import get_rank_and_world_size, is_true_anywhere
from gqaprune.common.precision import multiply_exactly
from gqaprune.common.stage_cache import StageCache, StageResult
from gqaprune.surgery.repair_config import RepairConfig


@multiply_exactly()
def settle_products(config: RepairConfig, device: torch.device, stages: StageCache | None = None) -> RepairConfig:
    """Replace `products: auto` with the faster dtype on rank 0's device, or with the choice that the run made before.

    On CPUs the dtypes are timed, which may end differently the next time, and a resumed run must keep its dtype.

    Args:
        config: settings of repair.
        device: device that trains.
        stages: stages of the run, which keep the choice.
    """
    if config.products != "auto" or not (config.refines or config.distills):
        return config

    def decide() -> StageResult:
        is_first = get_rank_and_world_size()[0] == 0
        is_faster = is_true_anywhere(is_first and _is_faster_in_bfloat16(device), device)
        return StageResult("bfloat16" if is_faster else "float32")

    stage = (stages or StageCache()).recall("type of products", {"device": device.type}, decide)
    if get_rank_and_world_size()[0] == 0:
        console.print(f"repair: trains with products in {stage.facts}; pruning.repair.products sets the type")
    return replace(config, products=stage.facts)


def multiply_in(products: str, device: torch.device) -> torch.autocast:
    """Return a context in which float32 modules multiply in `products`, `float32` or `bfloat16`."""
    return torch.autocast(device.type, torch.bfloat16, enabled=products == "bfloat16")


def _is_faster_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and is_faster_in_bfloat16()
