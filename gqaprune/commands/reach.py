"""Measure which rates a model allows: how much of each kind of block can be removed, and in which steps."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from gqaprune.models.architecture import Block, count_layer_parameters, find_blocks
from gqaprune.models.families import get_family
from gqaprune.planning.config import FREE, PruningConfig
from gqaprune.planning.selection import select_blocks

NAMES = {"attention": "GQA group", "mlp": "MLP channel"}
"""Kind of block -> name of the unit that is removed from it."""


@dataclass(frozen=True)
class Reach:
    """How much pruning can remove from one kind of block.

    Args:
        kind: `attention` or `mlp`.
        units: units of the largest block.
        unit_parameters: parameters of one of its units.
        of_block: one unit's share of its block, 0 to 1.
        of_layer: one unit's share of its layer's parameters.
        of_decoder: one unit's share of all decoder layers' parameters.
        blocks: number of blocks that may shrink by default.
        reachable: share of the decoder's parameters that can be removed from these, keeping one unit in each.
        reachable_anywhere: the same for all layers.
    """

    kind: str
    units: int
    unit_parameters: int
    of_block: float
    of_layer: float
    of_decoder: float
    blocks: int
    reachable: float
    reachable_anywhere: float

    def describe_step(self) -> str:
        """Describe the smallest step in words."""
        step = (
            f"one {NAMES[self.kind]} ({self.unit_parameters:,} parameters) is {_show(self.of_block)} of a layer's "
            f"{self.kind if self.kind == 'attention' else 'MLP'}, {_show(self.of_layer)} of a layer's parameters and "
            f"{_show(self.of_decoder)} of the decoder's"
        )
        return f"{step}; one in each of {self.blocks} layers is {_show(self.blocks * self.of_decoder)}"


def measure_reach(model: PreTrainedModel) -> list[Reach]:
    """Measure how much can be removed from each kind of block that the family allows. The model needs no weights."""
    layer_parameters = count_layer_parameters(model)
    decoder = sum(layer_parameters)
    kinds = [kind for kind in NAMES if kind not in get_family(model.config).whole]
    of_kind = {kind: [block for block in find_blocks(model) if block.key.kind == kind] for kind in kinds}
    # If a family keeps one kind whole, only the other is removed.
    split = FREE if len(kinds) == 2 else {"attention": "10:0", "mlp": "0:10"}[kinds[0]]
    default = select_blocks(model, PruningConfig(split=split))
    found = []
    for kind, blocks in of_kind.items():
        if not blocks:
            continue
        block = max(blocks, key=lambda block: block.units)
        allowed = [other for other in default if other.key.kind == kind]
        found.append(
            Reach(
                kind=kind,
                units=block.units,
                unit_parameters=block.unit_parameters,
                of_block=1 / block.units,
                of_layer=block.unit_parameters / layer_parameters[block.key.layer],
                of_decoder=block.unit_parameters / decoder,
                blocks=len(allowed),
                reachable=_count_removable(allowed) / decoder,
                reachable_anywhere=_count_removable(blocks) / decoder,
            )
        )
    return found


def _count_removable(blocks: list[Block]) -> int:
    return sum((block.units - 1) * block.unit_parameters for block in blocks)


def _show(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else f"{100 * share:.2g}%"
