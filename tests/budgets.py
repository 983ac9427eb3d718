"""Blocks and budgets as numbers, and what holds of every allocation."""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from hypothesis import strategies as st

from gqaprune.plan import BlockKey, BlockKind
from gqaprune.planning.allocation import ALLOCATIONS, AllocationOptions, BlockBudget, Budget, Removed


def allocate_by(name: str, **options: object) -> Callable[[Sequence[BlockBudget], Budget], Removed]:
    """An allocation with every layer as important as its index, unless the options say otherwise."""

    def allocate(blocks: Sequence[BlockBudget], budget: Budget) -> Removed:
        importance = {block.key: float(block.key.layer) for block in blocks}
        return ALLOCATIONS[name](blocks, budget, AllocationOptions(**{"importance": importance, **options}))

    return allocate


ALLOCATE = {name: allocate_by(name) for name in ALLOCATIONS}
"""Name -> allocation as a function of blocks and budget alone."""


def make_block(
    layer: int, kind: BlockKind, scores: Sequence[float], parameters: int, min_kept: int = 1, multiple: int = 1
) -> BlockBudget:
    return BlockBudget(BlockKey(layer, kind), sorted(scores), parameters, min_kept, multiple)


def make_budget(
    blocks: Sequence[BlockBudget], rate: float, min_rate: float = 0.0, max_rate: float = 1.0, base: int | None = None
) -> Budget:
    """A budget over the blocks' own parameters."""
    layers = 1 + max(block.key.layer for block in blocks)
    of_layer = [0] * layers
    for block in blocks:
        of_layer[block.key.layer] += block.units * block.unit_parameters
    return Budget(rate, base or sum(of_layer), of_layer, min_rate, max_rate)


def count_removed(blocks: Sequence[BlockBudget], removed: Removed) -> int:
    return sum(removed[block.key] * block.unit_parameters for block in blocks)


def sum_all(blocks: Sequence[BlockBudget]) -> int:
    return sum(block.units * block.unit_parameters for block in blocks)


def measure_half_step(blocks: Sequence[BlockBudget]) -> float:
    """Half of what one step of channels in every layer removes."""
    return sum(block.multiple * block.unit_parameters for block in blocks if block.key.kind == "mlp") / 2


def measure_layers(blocks: Sequence[BlockBudget], removed: Removed, budget: Budget) -> dict[int, float]:
    """Share of each layer that goes."""
    gone: dict[int, int] = defaultdict(int)
    for block in blocks:
        gone[block.key.layer] += removed[block.key] * block.unit_parameters
    return {layer: parameters / budget.layer_parameters[layer] for layer, parameters in gone.items()}


def read_nearest_rate(error: ValueError) -> float:
    found = re.search(r"nearest reachable rate is (\d\.\d+)", str(error))
    assert found, f"no rate in: {error}"
    return float(found[1])


def check_limits(blocks: Sequence[BlockBudget], removed: Removed, budget: Budget) -> None:
    assert removed.keys() == {block.key for block in blocks}
    for block in blocks:
        kept = block.units - removed[block.key]
        assert block.min_kept <= kept <= block.units
        assert kept == block.units or kept % block.multiple == 0
    can_shrink = {block.key.layer for block in blocks if len(block.removable_counts()) > 1}
    for layer, share in measure_layers(blocks, removed, budget).items():
        assert (budget.min_rate if layer in can_shrink else 0.0) <= share <= budget.max_rate


scores_of = st.one_of(
    st.floats(0, 1e6, allow_subnormal=False),
    st.sampled_from([0.0, 1.0, 2.0]),
    st.just(0.0),
)


@st.composite
def models(draw: st.DrawFn, most_layers: int = 4, most_channels: int = 12) -> list[BlockBudget]:
    """Layers of one shape with an attention and an MLP each, and random scores and limits."""
    groups, channels = draw(st.integers(1, 5)), draw(st.integers(2, most_channels))
    group_parameters, channel_parameters = draw(st.integers(1, 60)), draw(st.integers(1, 20))
    min_groups, min_channels = draw(st.integers(1, groups)), draw(st.integers(1, channels))
    multiple = draw(st.sampled_from([1, 1, 2, 3]))
    blocks = []
    for layer in range(draw(st.integers(1, most_layers))):
        scores = [draw(st.lists(scores_of, min_size=n, max_size=n)) for n in (groups, channels)]
        attention = make_block(layer, "attention", scores[0], group_parameters, min_groups)
        blocks += [replace(attention, unit_kv_heads=1)]
        blocks += [make_block(layer, "mlp", scores[1], channel_parameters, min_channels, multiple)]
    return blocks


def sum_kind(blocks: Sequence[BlockBudget], removed: Removed, kind: BlockKind) -> int:
    """Parameters that one kind of blocks loses."""
    return count_removed([block for block in blocks if block.key.kind == kind], removed)


def count_groups(removed: Removed) -> int:
    """Groups that go from all attention blocks."""
    return sum(count for key, count in removed.items() if key.kind == "attention")
