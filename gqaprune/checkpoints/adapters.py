"""LoRA adapters in checkpoints: merged into the weights that are saved, and saved by themselves beside them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor

from gqaprune.common.precision import multiply_exactly
from gqaprune.models.wrapping import ADAPTED, unwrap_name

ADAPTER_FOLDER = "adapter"
"""Where LoRA adapters are saved in a checkpoint's folder, whose weights have them already."""


def save_adapters(adapted: PeftModel, state_dict: Mapping[str, Tensor], folder: Path) -> None:
    """Save the adapters of a model by themselves, in peft's format.

    Args:
        adapted: peft's view of the model, which may be sharded.
        state_dict: whole weights of the model under it, adapters included.
        folder: where to.
    """
    named = {f"base_model.model.{name}": tensor for name, tensor in state_dict.items()}  # as peft names them
    adapted.save_pretrained(str(folder), state_dict=named)


@multiply_exactly()
@torch.no_grad()
def merge_adapters(adapted: PeftModel, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that a model without adapters needs to compute the same; nothing is changed.

    Args:
        adapted: peft's view of the model, which may be sharded.
        state_dict: whole weights of the model under it, adapters included.

    Raises:
        ValueError: if there are adapters of another kind than LoRA's on linear layers, or more than one on a layer.
    """
    weights = {name.replace(".base_layer.", "."): tensor for name, tensor in state_dict.items() if ".lora_" not in name}
    for path, module in adapted.get_base_model().named_modules():
        name = unwrap_name(path)  # as weights are named
        if isinstance(module, ADAPTED) and not _is_plain(module):
            raise ValueError(
                f"{name} has {type(module).__name__} adapters that cannot be merged on saving: save the model that "
                "merge_and_unload() of the PeftModel returns"
            )
        if isinstance(module, LoraLinear):
            (adapter,) = module.active_adapters
            down, up = (state_dict[f"{name}.lora_{part}.{adapter}.weight"].float() for part in "AB")
            weight = weights[f"{name}.weight"]
            weights[f"{name}.weight"] = (weight.float() + module.scaling[adapter] * (up @ down)).to(weight.dtype).cpu()
    return weights


def _is_plain(module: object) -> bool:
    """Whether a module computes with one LoRA product beside its weights, and nothing else."""
    if not isinstance(module, LoraLinear) or len(module.active_adapters) != 1:
        return False
    return not (module.merged or module.disable_adapters or module.lora_variant or any(module.lora_bias.values()))
