"""Groups of pruning settings: limits, sensitivity and swaps. Those of scoring and repair are in their packages."""

from dataclasses import dataclass
from numbers import Integral

from gqaprune.common.field_types import check_field_types
from gqaprune.planning.allocation import AllocationOptions
from gqaprune.scoring.sensitivity import SENSITIVITIES

LayerRange = tuple[int, int]


@dataclass(frozen=True)
class LimitsConfig:
    """What must be kept, and which layers may lose units.

    Args:
        attention_layers: decoder layers whose attention may lose units, the first and one past the last; equal ends
            mean none. Null means all layers if damage is measured after repair; otherwise all but the first seventh and
            the last fourteenth (4 and 2 of 30), which cost the most.
        mlp_layers: decoder layers whose MLP may lose channels, in the same form. Null means all but the first seventh
            and the last fourteenth.
        frozen_layers: number of the most important layers that lose nothing with any allocation; at least 0.
        min_groups: GQA groups to keep in every layer, at least 1; `granularity: query` keeps all of them.
        min_channels: MLP channels to keep in every layer, at least 1.
        min_rate: smallest share of its parameters, 0 to 1, that each layer with a removable unit loses.
        max_rate: largest share of its parameters, 0 to 1, that any layer loses.
        channel_multiple: kept MLP widths are multiples of this number (64 or 128 are fast on GPUs). Null means 32,
            which 8-bit formats need; or 1 for MLPs narrower than 1,024, and with `uniform`, where a larger step in
            every layer would change the rate.

    Raises:
        ValueError: if a setting is out of bounds.
    """

    attention_layers: LayerRange | None = None
    mlp_layers: LayerRange | None = None
    frozen_layers: int = 0
    min_groups: int = 1
    min_channels: int = 1
    min_rate: float = 0.0
    max_rate: float = 1.0
    channel_multiple: int | None = None

    def __post_init__(self) -> None:
        check_field_types(self)
        if not 0 <= self.min_rate <= self.max_rate <= 1:
            raise ValueError(
                "min_rate and max_rate must satisfy 0 <= min_rate <= max_rate <= 1, "
                f"got {self.min_rate} and {self.max_rate}"
            )
        for name in ("min_groups", "min_channels", "channel_multiple"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("attention_layers", "mlp_layers"):
            ends = getattr(self, name)
            if ends is not None and not _is_range(ends):
                raise ValueError(
                    f"{name} must be two layers, the first and one past the last, such as (4, 28), "
                    f"got {str(ends)[:40]!r}"
                )
        AllocationOptions(frozen_layers=self.frozen_layers)


def _is_range(ends: object) -> bool:
    is_pair = isinstance(ends, (list, tuple)) and len(ends) == 2
    return is_pair and all(isinstance(end, Integral) and not isinstance(end, bool) for end in ends)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class SensitivityConfig:
    """How the importance of layers is measured and used, by `inverse`, `proportional` and `limits.frozen_layers`.

    Args:
        method: how importance is measured, once on the dense model: `removal` (rise of the loss without the layer),
            `block_removal` (the same for attention and MLP separately), `activation` (norm of a block's output relative
            to the residual stream) or `block_influence` (how much the layer turns the residual stream).
        path: JSON file of the importance, read if it exists and written otherwise; null always measures.
        alpha: how strongly importance matters to `inverse` and `proportional`, 0 (not at all) to 50.
        log: use the logarithm of importance in `inverse` and `proportional`, so that one outstanding layer does not
            make all others equal.

    Raises:
        ValueError: if a setting is out of bounds.
    """

    method: str = "removal"
    path: str | None = None
    alpha: float = 1.0
    log: bool = False

    def __post_init__(self) -> None:
        check_field_types(self)
        if self.method not in SENSITIVITIES:
            raise ValueError(f"sensitivity.method must be one of {', '.join(SENSITIVITIES)}, got {self.method!r}")
        AllocationOptions(alpha=self.alpha)


@dataclass(frozen=True)
class SwapsConfig:
    """An evolutionary search that moves removals between blocks after the allocation.

    Args:
        generations: number of generations; 0 turns the search off. An allocation is replaced if the measured
            divergence from the dense model is smaller. After `uniform`, layers no longer have equal counts.
        offspring: allocations measured in each generation, at least 1.

    Raises:
        ValueError: if a setting is out of bounds.
    """

    generations: int = 0
    offspring: int = 8

    def __post_init__(self) -> None:
        check_field_types(self)
        if self.generations < 0:
            raise ValueError(f"swaps.generations must be at least 0, got {self.generations}")
        if self.offspring < 1:
            raise ValueError(f"swaps.offspring must be at least 1, got {self.offspring}")
