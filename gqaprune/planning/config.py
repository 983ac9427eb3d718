"""What to remove and how to choose it: the settings of the whole path, checked when they are made."""

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
"""The split that the allocation chooses."""
DAMAGES = ("repaired", "gated", "scores")
"""What `optimal` may count as damage."""
EFFORTS: Mapping[str, Mapping[str, Any]] = {
    "quick": {"criterion": "obs", "allocation": "uniform", "repair": {"epochs": 0, "distill_tokens": 0}},
    "default": {},
    "best": {"repair": {"distill_tokens": 1_048_576}},
}
"""What each effort sets, in place of a default."""


@dataclass(frozen=True)
class PruningConfig(RenamedAttributes):
    """What to remove and how to choose it.

    Args:
        rate: share of parameters to remove, 0 to below 1. 0 leaves the model as it is; with a `kv_rate` only groups go.
        rate_base: what `rate` is a share of: `decoder` (parameters of all decoder layers) or `all` (embeddings too).
        target_parameters: parameters to leave, such as 6e9, to the nearest step, in place of `rate`.
        target_size: bytes of weights to leave, in the type that they are loaded in, such as `5GB` or `4.7GiB`, in place
            of `rate`.
        effort: how much time pruning may take: `quick` (scores by `obs`, the same counts in every layer, least squares
            alone), `default`, or `best` (four times as long a distillation). It replaces defaults: a setting that has
            another value than its default keeps it.
        kv_rate: share of the KV heads, and so of the KV cache, to remove, to the nearest group (with
            `uniform` one of every layer); 0 lets the allocation choose.
        split: attention : MLP shares of what is removed, such as `2:8` (in YAML in quotes), within one GQA group
            (with `uniform` one of every layer); `free` lets the allocation choose. Null means `free` where the
            allocation sees what units cost after repair, as by default, or `kv_rate` or `granularity: query` ask
            attention to give; elsewhere channels alone.
        granularity: what attention loses: `group` (whole GQA groups: KV heads with their query heads) or `query` (the
            same number of query heads from every group of a layer, at most all but one; every KV head stays, and so
            does the KV cache), for models with too few KV heads to remove.
        criterion: what scores units. On gates: `fisher` (per sample), `taylor` (per accumulation). On weight gradients:
            `param_first`, `param_second`, `param_mix`, `vectorize`. On activations: `wanda`, `wifv`, `obs`. Without
            text: `l1`, `l2`, `random`. Two joined by `+` make their geometric mean.
        scoring: what shapes the scores besides the criterion.
        allocation: how the budget is spread: `optimal` (least total damage under all limits at once), `uniform` (equal
            counts in every layer of a range, so that the checkpoint needs no remote code when the ranges cover the
            model), `global` (lowest score per parameter anywhere), `inverse` (important layers lose less) or
            `proportional` (important layers lose more).
        damage: what `optimal` counts as the damage of removing units from a block: `repaired` (the divergence from the
            dense model without them, the block's other units refitted by least squares), `gated` (the same with nothing
            refitted) or `scores` (the sum of their scores). Ignored by other allocations.
        limits: what has to stay, and which layers may lose units.
        sensitivity: how the importance of layers is measured, and what follows from it.
        damage_levels: removals of each block, evenly spread up to the most that may go, at which `gated` measures, at
            least 2.
        swaps: a search that moves removals between blocks after the allocation.
        steps: cuts in which the budget is spent, at least 1, in equal parts; what is left is scored anew before each.
        repair: what makes up for the cut, on the calibration text.

    Groups of settings may be given as dictionaries, such as `limits={"min_groups": 2}`.

    Raises:
        ValueError: if a setting is out of its bounds, or two of them exclude each other.
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
        """Whether there is anything to remove."""
        has_target = self.target_parameters is not None or self.target_size is not None
        return self.rate > 0 or self.kv_rate > 0 or has_target

    @property
    def uses_importance(self) -> bool:
        """Whether the choice depends on the importance of layers."""
        return ALLOCATIONS[self.allocation].uses_importance or self.limits.frozen_layers > 0

    @property
    def uses_damage_curves(self) -> bool:
        """Whether the choice depends on measured damage of each block."""
        return ALLOCATIONS[self.allocation].uses_damage_curves and self.damage != "scores"

    @property
    def sees_repair(self) -> bool:
        """Whether the choice depends on what repair can make up for."""
        return self.uses_damage_curves and self.damage == "repaired"

    @property
    def needs_text(self) -> bool:
        """Whether anything is measured on calibration text."""
        measures = self.uses_importance or self.uses_damage_curves or self.swaps.generations > 0
        measures |= self.repair.method != "none" or needs_data(self.criterion)
        return self.removes_something and measures

    @property
    def attention_share(self) -> float | None:
        """Share of the removed parameters that attention gives; None where the allocation chooses."""
        if self.split is None:
            return None if self.kv_rate or self.granularity == "query" or self.sees_repair else 0.0
        return None if self.split == FREE else parse_split(self.split)

    def _build_groups(self) -> None:
        for field in fields(self):
            if (group := type(field.default)) in _GROUPS:
                value = build_group(f"pruning.{field.name}", group, getattr(self, field.name))
                object.__setattr__(self, field.name, value)

    def _apply_effort(self) -> None:
        """Set what the effort does, where a setting is at its default."""
        defaults = {field.name: field.default for field in fields(self)}
        for name, value in EFFORTS[self.effort].items():
            current, default = getattr(self, name), defaults[name]
            if isinstance(value, Mapping):
                kept = {key: one for key, one in value.items() if getattr(current, key) == getattr(default, key)}
                object.__setattr__(self, name, replace(current, **kept))
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
            raise ValueError("target_parameters and target_size are two sizes to reach: leave one of them")
        if not 0 <= self.rate < 1:
            raise ValueError(f"rate must be in [0, 1), a share of the parameters, got {self.rate}; 0.2 removes 20 %")
        if not 0 <= self.kv_rate < 1:
            raise ValueError(f"kv_rate must be in [0, 1), a share of the KV heads, got {self.kv_rate}")
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if self.damage_levels < 2:
            raise ValueError(
                f"damage_levels must be at least 2, got {self.damage_levels}; try 8, or damage: scores, which has none"
            )
        if self.split not in (None, FREE):
            parse_split(self.split)

    def _check_combinations(self) -> None:
        if self.kv_rate and self.split not in (None, FREE):
            raise ValueError(
                f"kv_rate {self.kv_rate} and split {self.split} both say how much attention gives: set one of them"
            )
        if self.kv_rate and self.granularity == "query":
            raise ValueError(f"kv_rate {self.kv_rate} needs granularity group: with query every KV head stays")
        is_gated = self.uses_damage_curves and not self.sees_repair
        if self.steps > 1 and (is_gated or self.swaps.generations):
            name = "damage: gated" if is_gated else "swaps.generations"
            raise ValueError(f"{name} measures cuts of the whole model, which several steps have not: set steps to 1")


_GROUPS = (ScoringConfig, LimitsConfig, SensitivityConfig, SwapsConfig, RepairConfig)
PruningConfig.__init__ = name_successors("pruning")(PruningConfig.__init__)  # type: ignore[method-assign]
