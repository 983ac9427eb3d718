"""What to remove and how to choose it: the settings of the whole path, checked when they are made."""

from dataclasses import dataclass

from gqaprune.models.architecture import GRANULARITIES
from gqaprune.planning.allocation import ALLOCATIONS, AllocationOptions, parse_split
from gqaprune.scoring.scores import ScoringOptions, needs_data, parse_criterion
from gqaprune.scoring.sensitivity import SENSITIVITIES
from gqaprune.surgery.refinement import RefinementOptions
from gqaprune.surgery.repair import RepairOptions

LayerRange = tuple[int, int]
REPAIRS = ("least_squares", "bias", "none")
FREE = "free"
"""The split that the allocation chooses."""


@dataclass(frozen=True)
class PruningConfig:
    """What to remove and how to choose it.

    Args:
        rate: share of parameters to remove, 0 to below 1. 0 leaves the model as it is; with a `kv_rate` only groups go.
        rate_base: what `rate` is a share of: `decoder` (parameters of all decoder layers) or `all` (embeddings too).
        criterion: what scores units. On gates: `fisher` (per sample), `taylor` (per window). On weight gradients:
            `param_first`, `param_second`, `param_mix`, `vectorize`. On activations: `wanda`, `wifv`, `obs`. Without
            text: `l1`, `l2`, `random`. Two joined by `+` make their geometric mean.
        reduction: how the members of a unit (rows and columns of its weights) make one score: `sum`, `mean`, `max`,
            `prod`. Ignored by criteria that look at gates or activations.
        normalization: what the scores of each block are divided by before blocks are compared: `none`, or their own
            `mean`, `sum` or `max`. Alone it changes nothing where the allocation does not compare blocks (`uniform`).
        obs_ridge: ridge of the criterion `obs`, as a multiple of the mean squared input; above 0. Ignored by others.
        protect_outliers: units that carry massive activations (an output 20 times that of their block's median unit, on
            the calibration text) go last, whatever their scores; nothing is protected where no text is read.
        allocation: how the budget is spread: `uniform` (equal counts in every layer of a range, so that the checkpoint
            needs no remote code when the ranges cover the model), `global` (lowest score per parameter anywhere),
            `inverse` (important layers lose less), `proportional` (important layers lose more) or `optimal` (least
            total damage under all limits at once).
        sensitivity: what makes a layer important: `removal` (rise of the loss without the layer), `block_removal` (the
            same for attention and MLP apart), `activation` (size of what a block adds) or `block_influence` (change of
            direction). Measured once on the dense model, for `inverse`, `proportional` and `frozen_layers` only.
        sensitivity_path: JSON file of the sensitivity, read if it is there and written if not; null measures it anew.
        alpha: strength of the difference that importance makes, 0 to 50, for `inverse` and `proportional` only; 0
            makes none.
        log_importance: take the logarithm of importance first, so that one outstanding layer does not make all others
            alike; for `inverse` and `proportional` only.
        frozen_layers: this many of the most important layers stay whole, whatever the allocation.
        damage_levels: removals of each block at which `optimal` measures the divergence from the dense model, at least
            2; 0 takes the sum of the removed units' scores for it. Ignored by other allocations.
        swap_generations: generations of an evolutionary search that moves removals between blocks while the measured
            divergence falls, after any allocation (a `uniform` one is not uniform then); 0 does without.
        swap_offspring: allocations measured in each of those generations.
        split: attention : MLP shares of what is removed, such as `2:8` (in YAML in quotes), within one GQA group
            (with `uniform` one of every layer); `free` lets the allocation choose. Null means channels alone, which
            cost least, unless `kv_rate` or `granularity: query` ask attention to give.
        kv_rate: share of the KV heads, and so of the KV cache, to remove, to the nearest group; 0 lets the allocation
            choose.
        granularity: what attention loses: `group` (whole GQA groups: KV heads with their query heads) or `query` (the
            same number of query heads from every group of a layer, at most all but one; every KV head stays, and so
            does the KV cache), for models with too few KV heads to remove.
        attention_layers: decoder layers whose attention may lose units, first and one past the last; equal ends mean
            none, null all but the first seventh and the last fourteenth (4 and 2 of 30), which cost most.
        mlp_layers: decoder layers whose MLP may lose channels, likewise.
        min_groups: GQA groups that stay in every layer, at least 1; with `granularity: query` all of them stay.
        min_channels: MLP channels that stay in every layer, at least 1.
        min_rate: least share of its parameters that each layer loses that has a removable unit, 0 to 1.
        max_rate: largest share of its parameters that any layer loses, 0 to 1.
        channel_multiple: kept MLP widths are multiples of it (64 or 128 runs fast on GPUs).
        steps: cuts in which the budget is spent, in equal parts; what is left is scored anew before each.
        repair: what makes up for the cut, on the calibration text: `least_squares` (refits the kept columns of the
            output projections, layer by layer), `bias` (a constant for what is gone, where the family's checkpoints
            have a place for it) or `none`.
        repair_pull: what least squares fit a block to, 0 to 1: at 0 its own output before the cut, at 1 what brings the
            hidden states back to the dense model's.
        repair_everywhere: also refit blocks that lose nothing after the first one that does; needs a pull.
        repair_ridges: ridge strengths that each block chooses from, on held-out calibration windows, downhill from the
            middle one.
        repair_holdout: share of the calibration batches that are held out for that choice and for how far
            training goes.
        repair_bias: fit a bias too, where the family's checkpoints have a place for it.
        repair_epochs: passes over the calibration text in which each MLP, after least squares, is trained by itself
            towards the same targets, all its weights; no loss of the language model takes part. 0 leaves it out.
        repair_learning_rate: peak learning rate of that, in units of each matrix's root mean square.

    Raises:
        ValueError: if a setting is out of its bounds, or two of them exclude each other.
    """

    rate: float = 0.2
    rate_base: str = "decoder"
    criterion: str = "fisher+obs"
    reduction: str = "sum"
    normalization: str = "none"
    obs_ridge: float = 0.1
    protect_outliers: bool = True
    allocation: str = "uniform"
    sensitivity: str = "removal"
    sensitivity_path: str | None = None
    alpha: float = 1.0
    log_importance: bool = False
    frozen_layers: int = 0
    damage_levels: int = 0
    swap_generations: int = 0
    swap_offspring: int = 8
    split: str | None = None
    kv_rate: float = 0.0
    granularity: str = "group"
    attention_layers: LayerRange | None = None
    mlp_layers: LayerRange | None = None
    min_groups: int = 1
    min_channels: int = 1
    min_rate: float = 0.0
    max_rate: float = 1.0
    channel_multiple: int = 1
    steps: int = 1
    repair: str = "least_squares"
    repair_pull: float = 0.5
    repair_everywhere: bool = True
    repair_ridges: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)
    repair_holdout: float = 0.1
    repair_bias: bool = False
    repair_epochs: int = 3
    repair_learning_rate: float = 0.02

    def __post_init__(self) -> None:
        self._check_names()
        self._check_bounds()
        self._check_combinations()
        self.scoring_options()
        self.repair_options()
        AllocationOptions(alpha=self.alpha, frozen_layers=self.frozen_layers)

    @property
    def removes_something(self) -> bool:
        """Whether there is anything to remove."""
        return self.rate > 0 or self.kv_rate > 0

    @property
    def uses_importance(self) -> bool:
        """Whether the choice depends on the importance of layers."""
        return ALLOCATIONS[self.allocation].uses_importance or self.frozen_layers > 0

    @property
    def uses_damage_curves(self) -> bool:
        """Whether the choice depends on measured damage of each block."""
        return ALLOCATIONS[self.allocation].uses_damage_curves and self.damage_levels > 0

    @property
    def needs_text(self) -> bool:
        """Whether anything is measured on calibration text."""
        measures = self.uses_importance or self.uses_damage_curves or self.swap_generations > 0
        measures |= self.repair != "none" or needs_data(self.criterion)
        return self.removes_something and measures

    @property
    def attention_share(self) -> float | None:
        """Share of the removed parameters that attention gives; None where the allocation chooses."""
        if self.split is None:
            return None if self.kv_rate or self.granularity == "query" else 0.0
        return None if self.split == FREE else parse_split(self.split)

    def scoring_options(self, seed: int = 0) -> ScoringOptions:
        """What shapes the scores besides the criterion."""
        return ScoringOptions(self.reduction, self.normalization, self.obs_ridge, seed)

    def repair_options(self) -> RepairOptions | None:
        """How blocks are repaired; None where they are not."""
        if self.repair == "none":
            return None
        if self.repair == "bias":
            return RepairOptions(holdout=self.repair_holdout, refit=False, bias=True)
        return RepairOptions(
            tuple(self.repair_ridges),
            self.repair_holdout,
            self.repair_pull,
            self.repair_everywhere and self.repair_pull > 0,
            bias=self.repair_bias,
            refinement=RefinementOptions(self.repair_epochs, self.repair_learning_rate),
        )

    def _check_names(self) -> None:
        for name, members in (
            ("rate_base", ("decoder", "all")),
            ("allocation", tuple(ALLOCATIONS)),
            ("sensitivity", tuple(SENSITIVITIES)),
            ("granularity", GRANULARITIES),
            ("repair", REPAIRS),
        ):
            if getattr(self, name) not in members:
                raise ValueError(f"{name} must be one of {', '.join(members)}, got {getattr(self, name)!r}")
        parse_criterion(self.criterion)

    def _check_bounds(self) -> None:
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate must be in [0, 1), a share of the parameters, got {self.rate}; 0.2 removes 20 %")
        if not 0 <= self.kv_rate < 1:
            raise ValueError(f"kv_rate must be in [0, 1), a share of the KV heads, got {self.kv_rate}")
        if not 0 <= self.min_rate <= self.max_rate <= 1:
            raise ValueError(
                "min_rate and max_rate must satisfy 0 <= min_rate <= max_rate <= 1, "
                f"got {self.min_rate} and {self.max_rate}"
            )
        for name in ("min_groups", "min_channels", "channel_multiple", "steps", "swap_offspring"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.swap_generations < 0:
            raise ValueError(f"swap_generations must be at least 0, got {self.swap_generations}")
        if self.damage_levels < 0 or self.damage_levels == 1:
            raise ValueError(f"damage_levels must be 0 or at least 2, got {self.damage_levels}; 6 is a start")
        if self.split not in (None, FREE):
            parse_split(self.split)

    def _check_combinations(self) -> None:
        if self.kv_rate and self.split not in (None, FREE):
            raise ValueError(
                f"kv_rate {self.kv_rate} and split {self.split} both say how much attention gives: set one of them"
            )
        if self.kv_rate and self.granularity == "query":
            raise ValueError(f"kv_rate {self.kv_rate} needs granularity group: with query every KV head stays")
        if self.steps > 1 and (self.uses_damage_curves or self.swap_generations):
            name = "damage_levels" if self.uses_damage_curves else "swap_generations"
            raise ValueError(f"{name} measures cuts of the whole model, which several steps have not: set steps to 1")
