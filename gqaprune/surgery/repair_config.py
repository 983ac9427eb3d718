"""The settings of repair and their defaults."""

from dataclasses import dataclass

from gqaprune.common.field_types import check_field_types

METHODS = ("least_squares", "bias", "none")
PRODUCTS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class RepairConfig:
    """How the remaining weights are repaired after the cut, on calibration text.

    Args:
        method: `least_squares` (refit the kept columns of the output projections, layer by layer), `bias` (replace
            removed units by their mean output, if the family's checkpoints can hold a bias) or `none`.
        pull: target of least squares, 0 to 1. At 0 a block is fitted to its own output before the cut; at 1 to the
            output that restores the dense model's hidden states, which also corrects errors of earlier layers.
        everywhere: also refit blocks that lose nothing, from the first cut block on. Without `pull` there is nothing to
            correct in them, and they are left unchanged.
        ridges: ridges above 0 that each block chooses from on held-out calibration windows, relative to the mean
            squared input of its kept columns. The search starts at the middle one and stops when errors grow.
        holdout: share of the calibration batches, between 0 and 1, that are held out to choose ridges and the length
            of training.
        bias: also fit a bias, if the family's checkpoints can hold one.
        epochs: passes over the calibration text in which all weights of each MLP are trained after least squares,
            towards the same targets and without the language model's loss. 0 turns this off.
        learning_rate: peak learning rate of these epochs, relative to each matrix's root mean square (for biases that
            are 0, to the largest matrix's). It warms up and decays to 0 as a cosine.
        distill_tokens: tokens of calibration text for distillation, the last step: the projections of all layers are
            trained together towards the dense model's predictions, by changes of rank 32, in at most three passes. 0
            turns it off. It is skipped, with a message, if not all layers are in memory (`offload`, `sharded`).
        distill_learning_rate: peak learning rate of distillation by AdamW, relative to each matrix's root mean square.
            It warms up and decays to 0 as a cosine.
        products: dtype of matrix products in both trainings: `float32`, `bfloat16` or `auto`, the faster one. The
            choice of `auto` is printed, reported and kept for resumed runs.

    Raises:
        ValueError: if a setting is out of bounds.
    """

    method: str = "least_squares"
    pull: float = 0.5
    everywhere: bool = True
    ridges: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
    holdout: float = 0.1
    bias: bool = False
    epochs: int = 3
    learning_rate: float = 0.02
    distill_tokens: int = 262_144
    distill_learning_rate: float = 0.01
    products: str = "auto"

    def __post_init__(self) -> None:
        check_field_types(self)
        if self.method not in METHODS:
            raise ValueError(f"repair.method must be one of {', '.join(METHODS)}, got {self.method!r}")
        if self.products not in PRODUCTS:
            raise ValueError(f"repair.products must be one of {', '.join(PRODUCTS)}, got {self.products!r}")
        if not self.ridges or not all(0 < ridge < float("inf") for ridge in self.ridges):
            raise ValueError(
                f"repair.ridges must be a list of at least one number above 0, got {self.ridges}; try [0.1, 0.3, 1]"
            )
        if not 0 < self.holdout < 1:
            raise ValueError(
                f"repair.holdout must be a share of the batches between 0 and 1, got {self.holdout}; try 0.1"
            )
        if not 0 <= self.pull <= 1:
            raise ValueError(f"repair.pull must be in [0, 1], got {self.pull}; try 0.5")
        if self.epochs < 0:
            raise ValueError(f"repair.epochs must be at least 0, got {self.epochs}; try 3")
        if not 0 < self.learning_rate <= 1:
            raise ValueError(
                f"repair.learning_rate must be in (0, 1], relative to the weights, got {self.learning_rate}; try 0.02"
            )
        if self.distill_tokens < 0:
            raise ValueError(f"repair.distill_tokens must be at least 0, got {self.distill_tokens}; try 262144")
        if not 0 < self.distill_learning_rate <= 1:
            raise ValueError(
                f"repair.distill_learning_rate must be in (0, 1], got {self.distill_learning_rate}; try 0.01"
            )

    @property
    def refits_weights(self) -> bool:
        """Whether output projections are refitted."""
        return self.method == "least_squares"

    @property
    def fits_biases(self) -> bool:
        """Whether biases are fitted, with the weights or alone as the mean output of the removed columns."""
        return self.method == "bias" or (self.refits_weights and self.bias)

    @property
    def follows_dense_model(self) -> bool:
        """Whether targets depend on the dense model's hidden states."""
        return self.refits_weights and self.pull > 0

    @property
    def refits_everywhere(self) -> bool:
        """Whether blocks that lose nothing are refitted as well."""
        return self.follows_dense_model and self.everywhere

    @property
    def refines(self) -> bool:
        """Whether MLPs are trained after their refit."""
        return self.refits_weights and self.epochs > 0

    @property
    def distills(self) -> bool:
        """Whether the decoder is trained towards the dense model's predictions at the end."""
        return self.refits_weights and self.distill_tokens > 0
