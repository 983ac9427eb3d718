"""How a pruned model is trained back: every weight, LoRA adapters, or either towards the dense model."""

from dataclasses import dataclass

MODES = ("none", "full", "lora", "distill", "lora+distill")


@dataclass(frozen=True)
class RecoveryConfig:
    """What recovery trains, and on which loss.

    Args:
        mode: `full` (every weight that pruning left), `lora` (low-rank adapters, merged on export), `distill` (every
            weight, towards the dense model's predictions), `lora+distill`, or `none`.
        lora_rank: rank of the adapters, at least 1.
        lora_alpha: their scale, times 1 / rank; above 0.
        lora_dropout: dropout of their input, 0 to below 1.
        lora_targets: projections that get one, by name; null takes all of attention and MLP.
        temperature: softens the distributions of student and teacher, above 0.
        distill_weight: share of the divergence from the teacher in the loss, 0 to 1; the rest is the language model's.
        hidden_weight: weight of the distance to the teacher's hidden states, added to the loss; at least 0.
        hidden_layers: decoder layers after which that is measured; null takes the last, before the final norm.
        teacher: the dense model to learn from, and for `predict` to compare with, as `model.pretrained`; null takes
            what a pruned checkpoint's plan names, or that.
        teacher_dtype: type of its weights, as `model.dtype`.
        teacher_top_k: this many of the teacher's likeliest tokens stand for its predictions: they are computed before
            training, once for the same text, and kept on disk (6 bytes each for every training token); then the teacher
            is let go. 0 keeps it in memory and takes all of them.
        rounds: prune-recover rounds, at least 1: the pruning callback spends its budget in so many equal shares, what
            is left being scored anew before each, and an equal share of the training steps follows each.

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
