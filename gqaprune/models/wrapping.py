"""Unwrap models from strategies, and detect sharded weights and adapters."""

from typing import cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedModel

ADAPTED = (BaseTunerLayer, AuxiliaryTrainingWrapper)
"""Classes by which PEFT replaces a module that it adapts."""


def unwrap_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model inside a strategy's wrapper, to read its config and class; its weights may be sharded."""
    return cast(PreTrainedModel, model.module) if isinstance(model, FullyShardedDataParallel) else model


def unwrap_name(name: str) -> str:
    """Return the name of a module or parameter without FSDP1's wrappers."""
    return name.replace("_fsdp_wrapped_module.", "")


def check_no_adapters(model: PreTrainedModel) -> None:
    """Raise an error if a model has PEFT adapters, because its weights alone do not determine its output.

    Raises:
        ValueError: with how to merge them.
    """
    if isinstance(model, PeftModel) or any(isinstance(module, ADAPTED) for module in model.modules()):
        raise ValueError(
            "the model has PEFT adapters beside its weights: merge them first, with merge_and_unload() of the "
            "PeftModel around it; save adapters from add_adapter with model.save_pretrained(adapter), and merge them "
            "with PeftModel.from_pretrained(model, adapter).merge_and_unload() into the model without them; or add "
            "them after pruning, which a LightningModule does in configure_model"
        )


def is_sharded(model: PreTrainedModel) -> bool:
    """Return whether a strategy has sharded the weights, so that they are only whole within a forward pass."""
    if isinstance(model, (FSDPModule, FullyShardedDataParallel)):
        return True
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
