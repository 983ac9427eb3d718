"""What strategies wrap models in, whether they have sharded the weights, and whether adapters wrap a part of them."""

from typing import cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedModel

ADAPTED = (BaseTunerLayer, AuxiliaryTrainingWrapper)
"""What PEFT puts in the place of a module that it adapts."""


def unwrap_model(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, to read its config and class; its weights may still be sharded."""
    return cast(PreTrainedModel, model.module) if isinstance(model, FullyShardedDataParallel) else model


def unwrap_name(name: str) -> str:
    """The name that a module or parameter has without FSDP1's wrappers."""
    return name.replace("_fsdp_wrapped_module.", "")


def check_no_adapters(model: PreTrainedModel) -> None:
    """Refuse a model with PEFT adapters, whose own weights are not what it computes with.

    Raises:
        ValueError: with how to merge them.
    """
    if isinstance(model, PeftModel) or any(isinstance(module, ADAPTED) for module in model.modules()):
        raise ValueError(
            "the model has PEFT adapters beside its weights: merge them first, by merge_and_unload() of the PeftModel "
            "around it; what add_adapter added is written by its save_pretrained(adapter), and merged by "
            "PeftModel.from_pretrained(model, adapter).merge_and_unload() into the model without it"
        )


def is_sharded(model: PreTrainedModel) -> bool:
    """Whether a strategy has sharded the weights, so that they are whole only within the model's own forward."""
    if isinstance(model, (FSDPModule, FullyShardedDataParallel)):
        return True
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
