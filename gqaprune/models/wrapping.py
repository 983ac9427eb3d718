"""What strategies wrap models in, and whether they have sharded the weights."""

from typing import cast

from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedModel


def unwrap_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, to read its config and class; its weights may still be sharded."""
    return cast(PreTrainedModel, model.module) if isinstance(model, FullyShardedDataParallel) else model


def unwrap_name(name: str) -> str:
    """The name that a module or parameter has without FSDP1's wrappers."""
    return name.replace("_fsdp_wrapped_module.", "")


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether a strategy has sharded the weights, so that they are whole only within the model's own forward."""
    if isinstance(model, (FSDPModule, FullyShardedDataParallel)):
        return True
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
