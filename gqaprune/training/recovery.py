"""How a pruned model is trained back: every weight, LoRA adapters, or either towards the dense model."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.models.families import get_family
from gqaprune.models.wrapping import unwrap_name
from gqaprune.placement.sharded_store import show_whole_shapes

MODES = ("none", "full", "lora", "distill", "lora+distill")


@dataclass(frozen=True)
class RecoveryConfig:
    """What recovery trains, and on which loss.

    Args:
        mode: `full` (every weight that pruning left), `lora` (low-rank adapters, merged on export), `distill` (every
            weight, towards the dense model's predictions), `lora+distill`, or `none`.
        lora_rank: rank of the adapters.
        lora_alpha: their scale, times 1 / rank.
        lora_dropout: dropout of their input, 0 to 1.
        lora_targets: projections that get one, by name; null takes all of attention and MLP.
        temperature: softens the distributions of student and teacher, above 0.
        distill_weight: share of the divergence from the teacher in the loss, 0 to 1; the rest is the language model's.
        hidden_weight: weight of the distance to the teacher's hidden states, added to the loss.
        hidden_layers: decoder layers after which that is measured; null takes the last.
        teacher: the dense model to learn from, and for `predict` to compare with, as `model.pretrained`; null takes
            what a pruned checkpoint's plan names, or that.
        teacher_dtype: type of its weights, as `model.dtype`.
        teacher_top_k: this many of the teacher's likeliest tokens stand for its predictions: they are computed before
            training, once for the same text, and kept on disk (6 bytes each for every training token); then the teacher
            is let go. 0 keeps it in memory and takes all of them.
        rounds: prune-recover rounds: the pruning callback spends its budget in so many equal shares, what is left being
            scored anew before each, and an equal share of the training steps follows each.

    Raises:
        ValueError: if a setting is out of its bounds.
    """

    mode: str = "full"
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: list[str] | None = None
    temperature: float = 1.0
    distill_weight: float = 1.0
    hidden_weight: float = 0.0
    hidden_layers: list[int] | None = None
    teacher: str | None = None
    teacher_dtype: str = "auto"
    teacher_top_k: int = 0
    rounds: int = 1

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"recovery.mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        if self.lora_rank < 1 or self.lora_alpha <= 0 or not 0 <= self.lora_dropout < 1:
            raise ValueError(
                "recovery needs lora_rank >= 1, lora_alpha > 0 and lora_dropout in [0, 1), got "
                f"{self.lora_rank}, {self.lora_alpha} and {self.lora_dropout}; 16, 32 and 0 are a start"
            )
        if self.teacher_top_k < 0:
            raise ValueError(f"recovery.teacher_top_k must be at least 0, got {self.teacher_top_k}; 64 is a start")
        if self.teacher_top_k and self.hidden_weight:
            raise ValueError(
                f"recovery.hidden_weight {self.hidden_weight} needs the teacher itself: set teacher_top_k to 0"
            )
        if self.hidden_layers is not None and min(self.hidden_layers, default=0) < 0:
            raise ValueError(f"recovery.hidden_layers counts decoder layers from 0, got {self.hidden_layers}")
        if self.rounds < 1:
            raise ValueError(f"recovery.rounds must be at least 1, got {self.rounds}; 2 is a start")
        if self.temperature <= 0 or not 0 <= self.distill_weight <= 1 or self.hidden_weight < 0:
            raise ValueError(
                "recovery needs temperature > 0, distill_weight in [0, 1] and hidden_weight >= 0, got "
                f"{self.temperature}, {self.distill_weight} and {self.hidden_weight}; 1, 1 and 0 are a start"
            )

    @property
    def uses_lora(self) -> bool:
        """Whether adapters are trained instead of the weights."""
        return "lora" in self.mode

    @property
    def distills(self) -> bool:
        """Whether there is a teacher."""
        return "distill" in self.mode


def add_adapters(model: PreTrainedModel, config: RecoveryConfig, seed: int = 0) -> PeftModel:
    """Put LoRA adapters into a model, in place, and freeze all else; the same seed begins with the same adapters.

    Returns:
        peft's view of the model, to merge and save the adapters with.

    Raises:
        ValueError: if a target is none of the model's projections.
    """
    names = list_projections(model)
    targets = names if config.lora_targets is None else config.lora_targets
    if unknown := sorted(set(targets) - set(names)) or not targets:
        raise ValueError(f"recovery.lora_targets: {unknown or 'none'} given; this model's are {', '.join(names)}")
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # a float does
        lora_dropout=config.lora_dropout,
        target_modules=list(targets),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), show_whole_shapes(model):  # peft takes shards for those of tensor parallelism
        torch.manual_seed(seed)
        adapted = get_peft_model(model, lora)
    assert isinstance(adapted, PeftModel)
    return adapted


@torch.no_grad()
def merge_adapters(adapted: PeftModel, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model as if it never had adapters, with what these add; nothing is changed.

    Args:
        adapted: peft's view of the model, which may be sharded.
        state_dict: whole weights of the model under it, adapters included.
    """
    weights = {name.replace(".base_layer.", "."): tensor for name, tensor in state_dict.items() if ".lora_" not in name}
    for path, module in adapted.get_base_model().named_modules():
        name = unwrap_name(path)  # as weights are named
        if isinstance(module, LoraLinear):
            (adapter,) = module.active_adapters
            down, up = (state_dict[f"{name}.lora_{part}.{adapter}.weight"].float() for part in "AB")
            weight = weights[f"{name}.weight"]
            weights[f"{name}.weight"] = (weight.float() + module.scaling[adapter] * (up @ down)).to(weight.dtype).cpu()
    return weights


def list_projections(model: PreTrainedModel) -> list[str]:
    """Names of the projections in a model's blocks."""
    family = get_family(model.config)
    return [name for layout in family.layouts.values() for name in (*layout.inputs, layout.output)]
