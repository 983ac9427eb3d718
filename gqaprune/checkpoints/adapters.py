"""Merge LoRA adapters into the weights of a checkpoint, and save the adapters beside them."""

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor

from gqaprune.common.precision import multiply_exactly
from gqaprune.models.wrapping import ADAPTED, unwrap_name

ADAPTER_FOLDER = "adapter"
"""Folder in a checkpoint with its LoRA adapters, which are already merged into the checkpoint's weights."""


def save_adapters(adapted: PeftModel, state_dict: Mapping[str, Tensor], folder: Path) -> None:
    """Save the adapters of a model by themselves, in peft's format.

    Args:
        adapted: peft's view of the model, which may be sharded.
        state_dict: whole weights of the model under it, adapters included.
        folder: folder to write to.
    """
    named = {f"base_model.model.{name}": tensor for name, tensor in state_dict.items()}  # as peft names them
    # Embeddings have no adapters; to find that out, peft would ask the hub for the dense model's configuration.
    adapted.save_pretrained(str(folder), state_dict=named, save_embedding_layers=False)


def check_merges(adapted: PeftModel) -> None:
    """Raise an error for adapters other than LoRA on linear layers, or several on one layer.

    Raises:
        ValueError: with the layer's name.
    """
    for path, module in adapted.get_base_model().named_modules():
        if isinstance(module, ADAPTED) and not _is_plain(module):
            raise ValueError(
                f"{unwrap_name(path)} has {type(module).__name__} adapters, which cannot be merged on saving: call "
                "merge_and_unload() of the PeftModel and save the model that it returns"
            )


@multiply_exactly()
@torch.no_grad()
def merge_adapters(adapted: PeftModel, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights with merged adapters, for a model without them; its arguments stay unchanged.

    Args:
        adapted: peft's view of the model, which may be sharded.
        state_dict: whole weights of the model under it, adapters included.

    Raises:
        ValueError: if there are adapters other than LoRA on linear layers, or several on one layer.
    """
    check_merges(adapted)
    weights = {name.replace(".base_layer.", "."): tensor for name, tensor in state_dict.items() if ".lora_" not in name}
    for path, module in adapted.get_base_model().named_modules():
        name = unwrap_name(path)  # the name in the state dict
        if isinstance(module, LoraLinear):
            (adapter,) = module.active_adapters
            down, up = (state_dict[f"{name}.lora_{part}.{adapter}.weight"].float() for part in "AB")
            weight = weights[f"{name}.weight"]
            weights[f"{name}.weight"] = (weight.float() + module.scaling[adapter] * (up @ down)).to(weight.dtype).cpu()
    return weights


def _is_plain(module: object) -> bool:
    """Return whether a module adds one LoRA product to its output, and nothing else."""
    if not isinstance(module, LoraLinear) or len(module.active_adapters) != 1:
        return False
    return not (module.merged or module.disable_adapters or module.lora_variant or any(module.lora_bias.values()))
