"""Settings of recovery: train every weight or LoRA adapters, on text or towards the dense model."""

from dataclasses import dataclass

MODES = ("none", "full", "lora", "distill", "lora+distill")


@dataclass(frozen=True)
class RecoveryConfig:
    """What recovery trains, and on which loss.

    Args:
        mode: `full` (train every weight that is left), `lora` (train low-rank adapters, merged on export), `distill`
            (train every weight towards the dense model's predictions), `lora+distill`, or `none`.
        lora_rank: rank of the LoRA adapters, at least 1.
        lora_alpha: scale of the LoRA adapters, above 0; they are multiplied by `lora_alpha / lora_rank`.
        lora_dropout: dropout of the LoRA adapters' input, 0 to below 1.
        lora_targets: names of the projections that get a LoRA adapter; null means all of attention and MLP.
        temperature: softens the distributions of student and teacher, above 0.
        distill_weight: weight of the divergence from the teacher in the loss, 0 to 1; the language model's loss has the
            rest.
        hidden_weight: weight of the distance to the teacher's hidden states, added to the loss; at least 0.
        hidden_layers: decoder layers after which that distance is measured; null means the last, before the final norm.
        teacher: dense model to learn from and, in `predict`, to compare with, written as `model.pretrained`; null means
            the model that a pruned checkpoint's plan names, else `model.pretrained`.
        teacher_dtype: type of the teacher's weights, as `model.dtype`.
        teacher_top_k: number of the teacher's likeliest tokens to learn from, at least 0. They are computed once before
            training and kept on disk (6 bytes each, for every training token), and then the teacher's memory is freed;
            0 keeps the teacher in memory and learns from all tokens.
        rounds: number of prune-recover rounds, at least 1. Each round scores the units that are left, removes an equal
            share of the budget and trains for an equal share of the steps.

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
                f"{self.lora_rank}, {self.lora_alpha} and {self.lora_dropout}; try 16, 32 and 0"
            )
        if self.teacher_top_k < 0:
            raise ValueError(f"recovery.teacher_top_k must be at least 0, got {self.teacher_top_k}; try 64")
        if self.teacher_top_k and self.hidden_weight:
            raise ValueError(
                f"recovery.hidden_weight {self.hidden_weight} needs the teacher in memory, but recovery.teacher_top_k "
                f"is {self.teacher_top_k}: set recovery.teacher_top_k to 0"
            )
        if self.hidden_layers is not None and min(self.hidden_layers, default=0) < 0:
            raise ValueError(
                f"recovery.hidden_layers must be decoder layers, counted from 0, got {self.hidden_layers}; try [0]"
            )
        if self.rounds < 1:
            raise ValueError(f"recovery.rounds must be at least 1, got {self.rounds}; try 2")
        if self.temperature <= 0 or not 0 <= self.distill_weight <= 1 or self.hidden_weight < 0:
            raise ValueError(
                "recovery needs temperature > 0, distill_weight in [0, 1] and hidden_weight >= 0, got "
                f"{self.temperature}, {self.distill_weight} and {self.hidden_weight}; try 1, 1 and 0"
            )

    @property
    def uses_lora(self) -> bool:
        """Whether adapters are trained instead of the weights."""
        return "lora" in self.mode

    @property
    def distills(self) -> bool:
        """Whether there is a teacher."""
        return "distill" in self.mode
