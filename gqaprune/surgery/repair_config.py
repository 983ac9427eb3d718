"""The settings of repair, with the one set of defaults that everything uses."""

from dataclasses import dataclass

from gqaprune.common.field_types import check_field_types

METHODS = ("least_squares", "bias", "none")
PRODUCTS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class RepairConfig:
    """What makes up for the cut, on the calibration text.

    Args:
        method: `least_squares` (refits the kept columns of the output projections, layer by layer), `bias` (a constant
            for what is removed, where the family's checkpoints have a place for it) or `none`.
        pull: what least squares fit a block to, 0 to 1: at 0 its own output before the cut, at 1 what brings the
            hidden states back to the dense model's, which also makes up for the error of the layers before.
        everywhere: also refit blocks that lose nothing after the first one that does; without a pull they have nothing
            to make up for and are left alone.
        ridges: ridge strengths above 0 that each block chooses from, in units of the mean squared input of the kept
            columns, on held-out calibration windows, downhill from the middle one.
        holdout: share of the calibration batches that are held out for that choice and for how far training goes,
            between 0 and 1.
        bias: fit a bias too, where the family's checkpoints have a place for it.
        epochs: passes over the calibration text in which each MLP, after least squares, is trained by itself towards
            the same targets, all its weights; no loss of the language model takes part. 0 leaves it out.
        learning_rate: peak learning rate of that, in units of each matrix's root mean square (of biases that are 0, the
            largest matrix's); it warms up and decays to 0 as a cosine.
        distill_tokens: tokens of calibration text on which the projections of all layers are trained together, last of
            all, by changes of rank 32, towards the predictions of the dense model; in three passes at most, 0 leaves
            it out. It is left out, too, which is said, where layers are kept elsewhere (`offload`, `sharded`).
        distill_learning_rate: peak learning rate of that, by AdamW, in units of each matrix's root mean square; it
            warms up and decays to 0 as a cosine.
        products: type that both trainings multiply in: `float32`, `bfloat16`, or `auto`, the faster one. What `auto`
            is found to mean is said, in the report, and kept for a resumed run.

    Raises:
        ValueError: if a setting is out of its bounds.
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
            raise ValueError(f"repair.ridges must be one or more numbers above 0, got {self.ridges}; try [0.1, 0.3, 1]")
        if not 0 < self.holdout < 1:
            raise ValueError(
                f"repair.holdout must be between 0 and 1, a share of the batches, got {self.holdout}; try 0.1"
            )
        if not 0 <= self.pull <= 1:
            raise ValueError(f"repair.pull must be in [0, 1], got {self.pull}; 0 fits each block to its own output")
        if self.epochs < 0:
            raise ValueError(f"repair.epochs must be at least 0, got {self.epochs}; try 3")
        if not 0 < self.learning_rate <= 1:
            raise ValueError(
                "repair.learning_rate must be above 0 and at most 1, a share of the weights' size, "
                f"got {self.learning_rate}; try 0.02"
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
        """Whether biases are fitted, beside the weights or alone as the mean of what the removed columns gave."""
        return self.method == "bias" or (self.refits_weights and self.bias)

    @property
    def follows_dense_model(self) -> bool:
        """Whether targets look at the dense model's hidden states."""
        return self.refits_weights and self.pull > 0

    @property
    def refits_everywhere(self) -> bool:
        """Whether blocks that lose nothing are refitted too."""
        return self.follows_dense_model and self.everywhere

    @property
    def refines(self) -> bool:
        """Whether MLPs are trained after their refit."""
        return self.refits_weights and self.epochs > 0

    @property
    def distills(self) -> bool:
        """Whether the decoder is trained towards the dense model's predictions last."""
        return self.refits_weights and self.distill_tokens > 0
