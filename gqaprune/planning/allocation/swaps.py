"""Refine an allocation by an evolutionary search that moves removals between blocks to lower the damage."""

import math
import random
from collections.abc import Callable, Sequence

from gqaprune.common.console import track
from gqaprune.planning.allocation.budget import BlockBudget, Budget, Removed, measure_layer_rates


def refine_by_swaps(
    removed: Removed,
    blocks: Sequence[BlockBudget],
    budget: Budget,
    evaluate: Callable[[Removed], float],
    generations: int,
    offspring: int,
    seed: int,
) -> Removed:
    """Move removals between blocks within the budget, keeping changes that lower the measured damage.

    Each generation makes offspring of the best allocation so far by one to three swaps each, and keeps the best of them
    if it is better. Source: the (1 + λ) search of EvoPress, arXiv 2410.14649. If the budget sets how much attention
    loses, swaps are within attention or within MLPs.

    Args:
        removed: the initial allocation.
        blocks: blocks that may change; they include all that lose units.
        budget: the budget that `removed` meets.
        evaluate: returns the damage of an allocation, such as the KL divergence on calibration windows; in a process
            group, the same bits on every rank. It is called at most `1 + generations · offspring` times.
        generations: number of generations.
        offspring: allocations tried in each generation.
        seed: seed of the swaps.

    Returns:
        The best allocation measured; `removed` itself if none was better.

    Raises:
        ValueError: if the damage of `removed` is not finite.
    """
    dice = random.Random(seed)
    best, damage = dict(removed), evaluate(removed)
    if not math.isfinite(damage):
        raise ValueError(
            f"the damage of the allocation is {damage}, so no swap can improve it: set swaps.generations to 0, or load "
            "the model with dtype bfloat16 or float32"
        )
    for _ in track(range(generations), "refining the allocation", "generations"):
        children = [_mutate(best, removed, blocks, budget, dice) for _ in range(offspring)]
        parent = best
        for child in children:
            if child != parent and (child_damage := evaluate(child)) < damage:
                best, damage = child, child_damage
    return best


def _mutate(
    parent: Removed, start: Removed, blocks: Sequence[BlockBudget], budget: Budget, dice: random.Random
) -> Removed:
    """Apply one to three swaps that keep the budget; return the parent if none is found."""
    child = parent
    for _ in range(min(dice.randint(1, 3), dice.randint(1, 3))):  # few swaps more often than many
        for _ in range(20):
            swapped = _swap(child, blocks, budget, dice)
            if swapped is not None and _keeps_budget(swapped, start, blocks, budget):
                child = swapped
                break
    return child


def _swap(parent: Removed, blocks: Sequence[BlockBudget], budget: Budget, dice: random.Random) -> Removed | None:
    """Remove more units of one block and restore about as many parameters of another; None if that is impossible."""
    giver = dice.choice(blocks)
    others = [block for block in blocks if block.key != giver.key]
    if budget.fixes_attention:
        others = [block for block in others if block.key.kind == giver.key.kind]
    if not others:
        return None
    taker = dice.choice(others)
    further = [count for count in giver.removable_counts() if count > parent[giver.key]]
    back = [count for count in taker.removable_counts() if count < parent[taker.key]]
    if not further or not back:
        return None
    # Moves of 1, 2, 4, … steps, so that small ones are as frequent as large ones.
    count = further[min(2 ** dice.randint(0, len(further).bit_length()), len(further)) - 1]
    parameters = (count - parent[giver.key]) * giver.unit_parameters
    kept = parent[taker.key] - parameters / taker.unit_parameters
    return {**parent, giver.key: count, taker.key: min(back, key=lambda count: abs(count - kept))}


def _keeps_budget(removed: Removed, start: Removed, blocks: Sequence[BlockBudget], budget: Budget) -> bool:
    """Whether an allocation meets the budget to within one unit, or as closely as the start, and all its limits."""

    def count(removed: Removed) -> int:
        return sum(removed[block.key] * block.unit_parameters for block in blocks)

    target = budget.target if budget.rate > 0 else count(start)
    one_unit = min(block.unit_parameters for block in blocks)
    if abs(count(removed) - target) > max(abs(count(start) - target), one_unit):
        return False
    before, after = measure_layer_rates(blocks, start, budget), measure_layer_rates(blocks, removed, budget)
    return all(
        min(budget.min_rate, before[layer]) <= rate <= max(budget.max_rate, before[layer])
        for layer, rate in after.items()
    )
