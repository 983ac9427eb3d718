"""The inputs of allocations, blocks and budgets as plain numbers, and the errors for budgets that cannot be met."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gqaprune.plan import BlockKey, BlockKind

Removed = dict[BlockKey, int]
"""Units to remove from each block."""


@dataclass(frozen=True)
class BlockBudget:
    """The description of a block that allocations use.

    Args:
        key: decoder layer and kind.
        scores: score of every unit, ascending.
        unit_parameters: parameters of one unit.
        min_kept: smallest number of units to keep.
        multiple: if any units are removed, the number of kept units must be a multiple of this.
        unit_kv_heads: KV heads of one unit: 1 for a GQA group, 0 for a channel.
    """

    key: BlockKey
    scores: Sequence[float]
    unit_parameters: int
    min_kept: int = 1
    multiple: int = 1
    unit_kv_heads: int = 0

    @property
    def units(self) -> int:
        """Number of units of the block before pruning."""
        return len(self.scores)

    def removable_counts(self) -> list[int]:
        """List the numbers of units that may be removed, ascending from 0."""
        kept = range(self.units - self.units % self.multiple, 0, -self.multiple)
        return [0, *(self.units - n for n in kept if self.min_kept <= n < self.units)]


@dataclass(frozen=True)
class Budget:
    """How much to remove.

    Args:
        rate: requested share of parameters to remove; with 0 and a `kv_rate`, no channels are removed.
        base_parameters: number of parameters that `rate` is a share of.
        layer_parameters: parameters of each decoder layer.
        min_rate: smallest share of its parameters that each layer with a removable unit loses.
        max_rate: largest share of its parameters that any layer loses.
        attention_share: attention's share of the removed parameters (0.2 is 2:8), to within one GQA group (with
            `uniform`, one of every layer); None lets the allocation choose.
        kv_rate: share of the KV heads, and so of the KV-cache bytes of each token, to remove, to the nearest group
            (with `uniform`, one of every layer); 0 lets the allocation choose.
        kv_heads: number of KV heads of all layers, that `kv_rate` is a share of.
        spared_attention: numbers of kept attention units that `uniform` avoids, because no stock class supports them.

    Raises:
        ValueError: if a share is out of bounds, or `kv_rate` and `attention_share` are both set.
    """

    rate: float
    base_parameters: int
    layer_parameters: Sequence[int]
    min_rate: float = 0.0
    max_rate: float = 1.0
    attention_share: float | None = None
    kv_rate: float = 0.0
    kv_heads: int = 0
    spared_attention: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        if self.attention_share is not None and not 0 <= self.attention_share <= 1:
            raise ValueError(f"attention_share must be in [0, 1], got {self.attention_share}; try 0.2 for 2:8")
        if not 0 <= self.kv_rate < 1:
            raise ValueError(f"kv_rate must be in [0, 1), a share of the KV heads, got {self.kv_rate}; try 0.25")
        if self.kv_rate and not self.kv_heads:
            raise ValueError(f"kv_rate {self.kv_rate} needs kv_heads, the model's KV heads, got 0")
        if self.kv_rate and self.attention_share is not None:
            raise ValueError(
                f"kv_rate {self.kv_rate} and attention_share {self.attention_share} both set how much attention loses: "
                "remove one of them"
            )

    @property
    def target(self) -> float:
        """Number of parameters to remove."""
        return self.rate * self.base_parameters

    @property
    def fixes_attention(self) -> bool:
        """Whether the budget sets how much attention loses."""
        return self.attention_share is not None or self.kv_rate > 0

    def attention_target(self) -> float:
        """Compute how much attention has to lose, in the unit of `count_attention`, if the budget sets it."""
        if self.kv_rate:
            return self.kv_rate * self.kv_heads
        assert self.attention_share is not None
        return self.attention_share * self.target

    def count_attention(self, parameters: int, kv_heads: int) -> int:
        """Return what the budget counts of attention: KV heads with a `kv_rate`, parameters otherwise."""
        return kv_heads if self.kv_rate else parameters

    def unreachable(self, reason: str, nearest: int | None = None) -> "UnreachableError":
        """Make the error for a budget that cannot be met within the limits.

        Args:
            reason: the reason, in words.
            nearest: the nearest reachable number of removed parameters, if there is one.
        """
        if nearest is None:
            return UnreachableError(self, reason)
        # Rounded away from the target, so that the suggested rate is reachable.
        rounded = math.floor if nearest < self.target else math.ceil
        scale = 10 ** max(4, len(str(self.base_parameters)))
        return UnreachableError(self, reason, rounded(nearest / self.base_parameters * scale) / scale)

    def unreachable_kv(self, reason: str, nearest: int) -> ValueError:
        """Make the error for a KV-cache budget that cannot be met within the limits.

        Args:
            reason: the reason, in words.
            nearest: the nearest reachable number of removed KV heads; 0 if none can be removed.
        """
        scale = 10 ** max(4, len(str(self.kv_heads)))
        rate = math.floor(nearest / self.kv_heads * scale) / scale
        way_out = f"the nearest reachable kv_rate is {rate}; change `kv_rate` to it, or loosen" if nearest else "loosen"
        return ValueError(
            f"cannot remove {self.kv_rate:.2%} of {self.kv_heads:,} KV heads: {reason}; {way_out} min_groups, "
            "max_rate, attention_layers or frozen_layers of pruning.limits"
        )


class UnreachableError(ValueError):
    """A budget cannot be met within the limits.

    Args:
        budget: the budget.
        reason: the reason, in words.
        nearest_rate: the nearest reachable rate, if there is one.
    """

    def __init__(self, budget: Budget, reason: str, nearest_rate: float | None = None) -> None:
        self.reason = reason
        way_out = "loosen"
        if nearest_rate is not None:
            way_out = f"the nearest reachable rate is {nearest_rate}; change `rate` to it, or loosen"
        also = "split, " if budget.attention_share is not None else "kv_rate, " if budget.kv_rate else ""
        super().__init__(
            f"cannot remove {budget.rate:.2%} of {budget.base_parameters:,} parameters: {reason}; {way_out} {also}"
            "min_groups, min_channels, min_rate, max_rate, attention_layers, mlp_layers or channel_multiple of "
            "pruning.limits"
        )


@dataclass(frozen=True)
class AllocationOptions:
    """Inputs of only some allocations.

    Args:
        importance: importance of each block, higher is more important; for `inverse`, `proportional` and
            `frozen_layers`.
        alpha: how strongly importance matters. The shares that the most and the least important block lose differ by a
            factor of e^alpha.
        log: use the logarithm of importance, so that one outstanding layer does not make all others equal.
        frozen_layers: number of the most important layers that lose nothing, regardless of `min_rate`.
        curves: damage of removing the weakest units of each block, as ascending pairs (units removed, damage); for
            `optimal`. None means the sum of the removed units' scores.

    Raises:
        ValueError: if a setting is out of bounds.
    """

    importance: Mapping[BlockKey, float] | None = None
    alpha: float = 1.0
    log: bool = False
    frozen_layers: int = 0
    curves: Mapping[BlockKey, Sequence[tuple[int, float]]] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 50:
            raise ValueError(f"alpha must be in [0, 50], got {self.alpha}; try 1")
        if self.frozen_layers < 0:
            raise ValueError(f"frozen_layers must be at least 0, got {self.frozen_layers}; try 2")

    def read_importance(self, blocks: Sequence[BlockBudget], reader: str) -> list[float]:
        """Return the importance of blocks, in their order.

        Args:
            blocks: the blocks.
            reader: name of the setting that needs importance, for the error.

        Raises:
            ValueError: if a block has no importance, or one that is not finite.
        """
        if self.importance is None:
            raise ValueError(f"{reader} needs the importance of every layer, got none; measure or load a sensitivity")
        for block in blocks:
            if not math.isfinite(self.importance.get(block.key, math.nan)):
                raise ValueError(
                    f"{reader} needs a finite importance of {block.key}, got {self.importance.get(block.key)}; measure "
                    "the sensitivity again"
                )
        return [self.importance[block.key] for block in blocks]


DEFAULT_OPTIONS = AllocationOptions()


def parse_split(split: str) -> float:
    """Parse a split `attention:MLP` of the removed parameters into attention's share: `2:8` is 0.2, `0:10` is 0.

    Raises:
        ValueError: if the text is not a split.
    """
    try:
        attention, mlp = (float(number) for number in split.split(":"))
    except ValueError:
        attention = mlp = math.nan
    if not (0 <= attention < math.inf and 0 <= mlp < math.inf and attention + mlp > 0):
        raise ValueError(
            f"split must be two numbers, attention:MLP, neither negative and not both 0, got {split!r}; try 2:8"
        )
    return attention / (attention + mlp)


def find_spared_kind(attention_share: float | None) -> BlockKind | None:
    """Return the kind of block that loses nothing with this share of attention; None if both may lose units."""
    if attention_share == 0:
        return "attention"
    return "mlp" if attention_share == 1 else None


def find_free_blocks(blocks: Sequence[BlockBudget], budget: Budget, options: AllocationOptions) -> list[BlockBudget]:
    """Find the blocks that may lose units, by the split and the number of frozen layers.

    The importance of a layer is the mean of its blocks'; of equally important layers, the first is frozen.

    Raises:
        ValueError: if importance is missing, or no block remains.
    """
    spared = find_spared_kind(budget.attention_share)
    allowed = [block for block in blocks if block.key.kind != spared]
    if not allowed:
        raise budget.unreachable(f"attention_share {budget.attention_share} leaves no block to prune")
    if not options.frozen_layers:
        return allowed
    of_layer: dict[int, list[float]] = defaultdict(list)
    for block, importance in zip(blocks, options.read_importance(blocks, "frozen_layers"), strict=True):
        of_layer[block.key.layer].append(importance)
    ranked = sorted(of_layer, key=lambda layer: (-sum(of_layer[layer]) / len(of_layer[layer]), layer))
    free = set(ranked[options.frozen_layers :])
    if not free:
        raise budget.unreachable(f"frozen_layers {options.frozen_layers} leaves none of {len(ranked)} layers to prune")
    return [block for block in allowed if block.key.layer in free]


def allocate_or_name_rate(allocate: Callable[[Budget], Removed], budget: Budget) -> Removed:
    """Allocate; if a split cannot be met, raise an error with the nearest rate at which it can.

    With a split, both attention and MLP change with the rate, so the nearest reachable rate has to be searched.

    Raises:
        UnreachableError: with the nearest reachable rate.
    """
    try:
        return allocate(budget)
    except UnreachableError as error:
        if budget.attention_share is None:
            raise

        def is_reachable(rate: float) -> bool:
            try:
                allocate(replace(budget, rate=rate))
            except UnreachableError:
                return False
            return True

        nearest = _search_nearest(budget.rate, is_reachable)
        raise UnreachableError(budget, error.reason, nearest) from None


def _search_nearest(rate: float, is_reachable: Callable[[float], bool]) -> float | None:
    """Search the nearest reachable rate by doubling the distance, then bisecting, in steps of 0.0001."""
    scale = 10_000
    start = round(rate * scale)
    reachable = []
    for sign, limit in ((-1, start - 1), (1, scale - 1 - start)):
        bad, distance = 0, 1
        while bad < limit and not is_reachable((start + sign * distance) / scale):
            bad, distance = distance, min(2 * distance, limit)
        while bad < limit and distance - bad > 1:
            middle = (bad + distance) // 2
            bad, distance = (bad, middle) if is_reachable((start + sign * middle) / scale) else (middle, distance)
        if bad < limit:
            reachable.append((start + sign * distance) / scale)
    return min(reachable, key=lambda nearest: abs(nearest - rate), default=None)


def measure_layer_rates(blocks: Sequence[BlockBudget], removed: Removed, budget: Budget) -> dict[int, float]:
    """Compute the share of its parameters that each layer of some blocks loses."""
    parameters: dict[int, int] = defaultdict(int)
    for block in blocks:
        parameters[block.key.layer] += removed[block.key] * block.unit_parameters
    return {layer: count / budget.layer_parameters[layer] for layer, count in parameters.items()}
