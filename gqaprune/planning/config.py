"""The settings of pruning, checked when they are created."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from gqaprune.common.field_types import check_field_types
from gqaprune.common.renamed import RenamedAttributes, build_group, name_successors
from gqaprune.models.architecture import GRANULARITIES
from gqaprune.planning.allocation import ALLOCATIONS, parse_split
from gqaprune.planning.groups import LimitsConfig, SensitivityConfig, SwapsConfig
from gqaprune.scoring.scores import ScoringConfig, needs_data, parse_criterion
from gqaprune.surgery.repair_config import RepairConfig

FREE = "free"
"""The value of `split` that leaves it to the allocation."""
DAMAGES = ("repaired", "gated", "scores")
"""Definitions of damage that `optimal` can minimise."""
EFFORTS: Mapping[str, Mapping[str, Any]] = {
    "quick": {"criterion": "obs", "allocation": "uniform", "repair": {"epochs": 0, "distill_tokens": 0}},
    "default": {},
    "best": {"repair": {"distill_tokens": 1_048_576}},
}
"""Settings that each effort uses instead of the defaults."""


@dataclass(frozen=True)
class PruningConfig(RenamedAttributes):
    """What to remove and how to choose it.

    Args:
        rate: share of parameters to remove, at least 0 and below 1. 0 removes nothing, or only GQA groups if `kv_rate`
            is set.
        rate_base: what `rate` is a share of: `decoder` (parameters of all decoder layers) or `all` (with embeddings).
        target_parameters: parameters to keep, such as 6e9, to the nearest step; replaces `rate`.
        target_size: bytes of weights to keep, in the dtype that they are loaded in, such as `5GB` or `4.7GiB`; replaces
            `rate`.
        effort: how much time pruning may take: `quick` (criterion `obs`, the same counts in every layer, least squares
            alone), `default`, or `best` (distillation on four times as much text). It only changes settings that have
            their default values.
        kv_rate: share of the KV heads, and so of the KV cache, to remove, to the nearest group (with `uniform`, one
            group of every layer); 0 leaves it to the allocation.
        split: attention : MLP shares of the removed parameters, such as `2:8` (quoted in YAML), to within one GQA group
            (with `uniform`, one of every layer); `free` leaves it to the allocation. Null means `free` if damage is
            measured after repair, as by default, or with `kv_rate` or `granularity: query`; otherwise only channels
            are removed.
        granularity: units of attention: `group` (whole GQA groups: KV heads with their query heads) or `query` (the
            same number of query heads from every group of a layer, leaving at least one). `query` keeps all KV heads
            and the whole KV cache, and is meant for models with few KV heads.
        criterion: how units are scored. From gates: `fisher` (per sample), `taylor` (per accumulation). From weight
            gradients: `param_first`, `param_second`, `param_mix`, `vectorize`. From activations: `wanda`, `wifv`,
            `obs`. Without text: `l1`, `l2`, `random`. Two joined by `+` are combined by their geometric mean.
        scoring: further settings of the scores.
        allocation: how the budget is spread: `optimal` (least total damage under all limits at once), `uniform` (equal
            counts in every layer of a range, so that the checkpoint needs no remote code if the ranges cover the
            model), `global` (lowest score per parameter anywhere), `inverse` (important layers lose less) or
            `proportional` (important layers lose more).
        damage: how `optimal` measures the damage of removing units from a block: `repaired` (divergence from the dense
            model after the block's other units are refitted by least squares), `gated` (the same without a refit) or
            `scores` (sum of the removed scores). Ignored by other allocations.
        limits: what must be kept, and which layers may lose units.
        sensitivity: how the importance of layers is measured and used.
        damage_levels: number of removals, evenly spread, at which `gated` measures each block; at least 2.
        swaps: a search that moves removals between blocks after the allocation.
        steps: number of equal cuts in which the budget is spent, at least 1. The remaining units are scored again
            before each.
        repair: how the remaining weights are repaired after the cut, on calibration text.

    Groups of settings may be given as dictionaries, such as `limits={"min_groups": 2}`.

    Raises:
        ValueError: if a setting is out of bounds, or two settings exclude each other.
    """

    rate: float = 0.2
    rate_base: str = "decoder"
    target_parameters: float | None = None
    target_size: str | None = None
    effort: str = "default"
    kv_rate: float = 0.0
    split: str | None = None
    granularity: str = "group"
    criterion: str = "fisher+obs"
    scoring: ScoringConfig = ScoringConfig()  # noqa: RUF009
    allocation: str = "optimal"
    limits: LimitsConfig = LimitsConfig()  # noqa: RUF009
    sensitivity: SensitivityConfig = SensitivityConfig()  # noqa: RUF009
    damage: str = "repaired"
    damage_levels: int = 8
    swaps: SwapsConfig = SwapsConfig()  # noqa: RUF009
    steps: int = 1
    repair: RepairConfig = RepairConfig()  # noqa: RUF009

    def __post_init__(self) -> None:
        self._build_groups()
        check_field_types(self)
        self._check_names()
        self._apply_effort()
        self._check_bounds()
        self._check_combinations()

    @property
    def removes_something(self) -> bool:
        """Whether anything is to be removed."""
        has_target = self.target_parameters is not None or self.target_size is not None
        return self.rate > 0 or self.kv_rate > 0 or has_target

    @property
    def uses_importance(self) -> bool:
        """Whether the choice depends on the importance of layers."""
        return ALLOCATIONS[self.allocation].uses_importance or self.limits.frozen_layers > 0

    @property
    def uses_damage_curves(self) -> bool:
        """Whether the choice depends on the measured damage of each block."""
        return ALLOCATIONS[self.allocation].uses_damage_curves and self.damage != "scores"

    @property
    def sees_repair(self) -> bool:
        """Whether the choice depends on damage after repair."""
        return self.uses_damage_curves and self.damage == "repaired"

    @property
    def needs_text(self) -> bool:
        """Whether anything is measured on calibration text."""
        measures = self.uses_importance or self.uses_damage_curves or self.swaps.generations > 0
        measures |= self.repair.method != "none" or needs_data(self.criterion)
        return self.removes_something and measures

    @property
    def attention_share(self) -> float | None:
        """Attention's share of the removed parameters; None if the allocation chooses it."""
        if self.split is None:
            return None if self.kv_rate or self.granularity == "query" or self.sees_repair else 0.0
        return None if self.split == FREE else parse_split(self.split)

    def _build_groups(self) -> None:
        for field in fields(self):
            if (group := type(field.default)) in _GROUPS:
                value = build_group(f"pruning.{field.name}", group, getattr(self, field.name))
                object.__setattr__(self, field.name, value)

    def _apply_effort(self) -> None:
        """Apply the effort's settings to those that have their default values."""
        defaults = {field.name: field.default for field in fields(self)}
        for name, value in EFFORTS[self.effort].items():
            current, default = getattr(self, name), defaults[name]
            if isinstance(value, Mapping):
                changes = {key: new for key, new in value.items() if getattr(current, key) == getattr(default, key)}
                object.__setattr__(self, name, replace(current, **changes))
            elif current == default:
                object.__setattr__(self, name, value)

    def _check_names(self) -> None:
        for name, members in (
            ("rate_base", ("decoder", "all")),
            ("effort", tuple(EFFORTS)),
            ("allocation", tuple(ALLOCATIONS)),
            ("damage", DAMAGES),
            ("granularity", GRANULARITIES),
        ):
            if getattr(self, name) not in members:
                raise ValueError(f"{name} must be one of {', '.join(members)}, got {getattr(self, name)!r}")
        parse_criterion(self.criterion)

    def _check_bounds(self) -> None:
        if self.target_parameters is not None and self.target_size is not None:
            raise ValueError("target_parameters and target_size cannot both be set: remove one of them")
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate must be in [0, 1), a share of the parameters, got {self.rate}; try 0.2 for 20 %")
        if not 0 <= self.kv_rate < 1:
            raise ValueError(f"kv_rate must be in [0, 1), a share of the KV heads, got {self.kv_rate}; try 0.25")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.damage_levels < 2:
            raise ValueError(
                f"damage_levels must be at least 2, got {self.damage_levels}; try 8, or damage: scores, which uses none"
            )
        if self.split not in (None, FREE):
            parse_split(self.split)

    def _check_combinations(self) -> None:
        if self.kv_rate and self.split not in (None, FREE):
            raise ValueError(
                f"kv_rate {self.kv_rate} and split {self.split} both set how much attention loses: remove one of them"
            )
        if self.kv_rate and self.granularity == "query":
            raise ValueError(f"kv_rate {self.kv_rate} needs granularity: group, because query keeps every KV head")
        is_gated = self.uses_damage_curves and not self.sees_repair
        if self.steps > 1 and (is_gated or self.swaps.generations):
            name = "damage: gated" if is_gated else "swaps.generations"
            raise ValueError(f"{name} works with a single cut, got steps {self.steps}: set steps to 1")


_GROUPS = (ScoringConfig, LimitsConfig, SensitivityConfig, SwapsConfig, RepairConfig)
PruningConfig.__init__ = name_successors("pruning")(PruningConfig.__init__)  # type: ignore[method-assign]
