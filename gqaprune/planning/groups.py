"""Groups of pruning settings: limits, sensitivity, swaps. `gqaprune.scoring` and `gqaprune.surgery` have their own."""

from dataclasses import dataclass
from numbers import Integral

from gqaprune.common.field_types import check_field_types
from gqaprune.planning.allocation import AllocationOptions
from gqaprune.scoring.sensitivity import SENSITIVITIES

LayerRange = tuple[int, int]


@dataclass(frozen=True)
class LimitsConfig:
    """What has to stay, and which layers may lose units.

    Args:
        attention_layers: decoder layers whose attention may lose units, first and one past the last; equal ends mean
            none, null all but the first seventh and the last fourteenth (4 and 2 of 30), which cost most, or all where
            the damage after repair is measured of each.
        mlp_layers: decoder layers whose MLP may lose channels, likewise; null all but those at the ends.
        frozen_layers: this many of the most important layers stay whole, whatever the allocation; at least 0.
        min_groups: GQA groups that stay in every layer, at least 1; with `granularity: query` all of them stay.
        min_channels: MLP channels that stay in every layer, at least 1.
        min_rate: least share of its parameters that each layer loses that has a removable unit, 0 to 1.
        max_rate: largest share of its parameters that any layer loses, 0 to 1.
        channel_multiple: kept MLP widths are multiples of it (64 or 128 runs fast on GPUs); null means 32, which 8-bit
            formats ask for, or 1 of MLPs narrower than 1,024 and with `uniform`, to whose rate a step in every layer
            matters.

    Raises:
        ValueError: if a setting is out of its bounds.
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
                    f"{name} must be two layers, the first and the end, such as (4, 28), got {str(ends)[:40]!r}"
                )
        AllocationOptions(frozen_layers=self.frozen_layers)


def _is_range(ends: object) -> bool:
    is_pair = isinstance(ends, (list, tuple)) and len(ends) == 2
    return is_pair and all(isinstance(end, Integral) and not isinstance(end, bool) for end in ends)  # type: ignore[attr-defined]


@dataclass(frozen=True)
class SensitivityConfig:
    """How the importance of layers is measured, and what follows from it.

    Args:
        method: what makes a layer important: `removal` (rise of the loss without the layer), `block_removal` (the
            same for attention and MLP apart), `activation` (size of what a block adds) or `block_influence` (change of
            direction). Measured once on the dense model, for allocations `inverse` and `proportional` and for
            `limits.frozen_layers` only.
        path: JSON file of the importance, read if it is there and written if not; null measures it anew.
        alpha: strength of the difference that importance makes, 0 to 50, for `inverse` and `proportional` only; 0
            makes none.
        log: take the logarithm of importance first, so that one outstanding layer does not make all others alike; for
            `inverse` and `proportional` only.

    Raises:
        ValueError: if a setting is out of its bounds.
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
        generations: generations of the search, which goes on while the measured divergence from the dense model falls;
            after any allocation (a `uniform` one is not uniform then); 0 does without.
        offspring: allocations measured in each generation, at least 1.

    Raises:
        ValueError: if a setting is out of its bounds.
    """

    generations: int = 0
    offspring: int = 8

    def __post_init__(self) -> None:
        check_field_types(self)
        if self.generations < 0:
            raise ValueError(f"swaps.generations must be at least 0, got {self.generations}")
        if self.offspring < 1:
            raise ValueError(f"swaps.offspring must be at least 1, got {self.offspring}")
