"""Add LoRA adapters to a model in training, and merge them into its weights before the next cut."""

import os
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PretrainedConfig, PreTrainedModel

from gqaprune.common.precision import multiply_exactly
from gqaprune.models.families import get_family
from gqaprune.placement.sharded_store import show_whole_shapes
from gqaprune.training.recovery import RecoveryConfig


class Adapters:
    """Keeps peft's view of a model that has LoRA adapters.

    It is not a torch module, so that Lightning does not mistake the view for a second model.

    Attributes:
        view: peft's view, to merge and save the adapters with; None without adapters.
    """

    def __init__(self) -> None:
        self.view: PeftModel | None = None

    def add(self, model: PreTrainedModel, settings: RecoveryConfig, rounds_done: int = 0) -> None:
        """Add adapters to a model, in place, if the settings ask for them and it has none yet.

        Args:
            model: model whose other weights are frozen.
            settings: settings of the adapters.
            rounds_done: rounds that are done; added to the run's seed, so that each round begins with other adapters.
        """
        if settings.uses_lora and self.view is None:
            seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) + rounds_done
            self.view = add_adapters(model, settings, seed)

    @multiply_exactly()
    def merge(self, model: PreTrainedModel) -> PreTrainedModel:
        """Merge the adapters into a model's weights, if it has any, and return it without them."""
        if self.view is None:
            return model
        view, self.view = self.view, None
        merged: PreTrainedModel = view.merge_and_unload()
        return merged


def add_adapters(model: PreTrainedModel, config: RecoveryConfig, seed: int = 0) -> PeftModel:
    """Add LoRA adapters to a model, in place, and freeze all other weights; the seed determines their first values.

    Returns:
        peft's view of the model, to merge and save the adapters with.

    Raises:
        ValueError: if a target is not one of the model's projections.
    """
    check_targets(model.config, config)
    targets = config.lora_targets or list_projections(model.config)
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # a float works, too
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), show_whole_shapes(model):  # peft would mistake shards for tensor parallelism
        torch.manual_seed(seed)
        with warnings.catch_warnings():  # peft asks for an attribute that transformers has renamed
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            adapted = get_peft_model(model, lora)
    assert isinstance(adapted, PeftModel)
    return adapted


def check_targets(model_config: PretrainedConfig, config: RecoveryConfig) -> None:
    """Raise an error if an adapter's target is not a projection of the model.

    Raises:
        ValueError: with the names of its projections.
    """
    names, targets = list_projections(model_config), config.lora_targets
    if targets is not None and (unknown := sorted(set(targets) - set(names)) or not targets):
        raise ValueError(
            f"recovery.lora_targets must be projections of the model, got {unknown if targets else 'none'}: use "
            f"{', '.join(names)}"
        )


def list_projections(model_config: PretrainedConfig) -> list[str]:
    """List the names of the projections in a model's blocks."""
    family = get_family(model_config)
    return [name for layout in family.layouts.values() for name in (*layout.inputs, layout.output)]
