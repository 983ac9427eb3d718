"""LoRA adapters of a model in training: added, and folded into its weights before the next cut."""

import os

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PretrainedConfig, PreTrainedModel

from gqaprune.common.precision import multiply_exactly
from gqaprune.models.families import get_family
from gqaprune.placement.sharded_store import show_whole_shapes
from gqaprune.training.recovery import RecoveryConfig


class Adapters:
    """Keep peft's view of a model that has LoRA adapters.

    It is no torch module, so that Lightning does not take the view for a second model.

    Attributes:
        view: peft's, to merge and save the adapters with; None while there are none.
    """

    def __init__(self) -> None:
        self.view: PeftModel | None = None

    def add(self, model: PreTrainedModel, settings: RecoveryConfig, rounds_done: int = 0) -> None:
        """Put adapters into a model, in place, if the settings ask for them and it has none yet.

        Args:
            model: whose other weights are frozen.
            settings: of the adapters.
            rounds_done: changes the weights that they begin with, beside the run's seed.
        """
        if settings.uses_lora and self.view is None:
            seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) + rounds_done
            self.view = add_adapters(model, settings, seed)

    @multiply_exactly()
    def merge(self, model: PreTrainedModel) -> PreTrainedModel:
        """Fold the adapters into a model's weights, if it has any, and return it without them."""
        if self.view is None:
            return model
        view, self.view = self.view, None
        merged: PreTrainedModel = view.merge_and_unload()
        return merged


def add_adapters(model: PreTrainedModel, config: RecoveryConfig, seed: int = 0) -> PeftModel:
    """Put LoRA adapters into a model, in place, and freeze all else; the same seed begins with the same adapters.

    Returns:
        peft's view of the model, to merge and save the adapters with.

    Raises:
        ValueError: if a target is none of the model's projections.
    """
    check_targets(model.config, config)
    targets = config.lora_targets or list_projections(model.config)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # a float does
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), show_whole_shapes(model):  # peft takes shards for those of tensor parallelism
        torch.manual_seed(seed)
        adapted = get_peft_model(model, lora)
    assert isinstance(adapted, PeftModel)
    return adapted


def check_targets(model_config: PretrainedConfig, config: RecoveryConfig) -> None:
    """Refuse adapters of what is no projection of a model.

    Raises:
        ValueError: with the names of its projections.
    """
    names, targets = list_projections(model_config), config.lora_targets
    if targets is not None and (unknown := sorted(set(targets) - set(names)) or not targets):
        raise ValueError(
            f"recovery.lora_targets: {unknown if targets else 'none'} given; this model's are {', '.join(names)}"
        )


def list_projections(model_config: PretrainedConfig) -> list[str]:
    """Names of the projections in a model's blocks."""
    family = get_family(model_config)
    return [name for layout in family.layouts.values() for name in (*layout.inputs, layout.output)]
