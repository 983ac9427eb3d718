"""What rates a model allows: how much of each kind of block can go, and what its finest step costs."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from gqaprune.models.architecture import Block, count_layer_parameters, find_blocks
from gqaprune.models.families import get_family
from gqaprune.planning.config import FREE, PruningConfig
from gqaprune.planning.selection import select_blocks

NAMES = {"attention": "GQA group", "mlp": "MLP channel"}
"""What a kind of block loses."""


@dataclass(frozen=True)
class Reach:
    """What pruning can take from one kind of block.

    Args:
        kind: `attention` or `mlp`.
        units: units of the block that has most.
        unit_parameters: of one unit there.
        of_block: share of its block that one unit is there, 0 to 1.
        of_layer: share of its layer's parameters.
        of_decoder: share of all decoder layers' parameters.
        blocks: blocks that may shrink by default.
        reachable: share of the decoder's parameters that can go from these, one unit staying in each.
        reachable_anywhere: likewise from all layers.
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
        """The finest step in words."""
        step = (
            f"one {NAMES[self.kind]} ({self.unit_parameters:,} parameters) is {_show(self.of_block)} of a layer's "
            f"{self.kind if self.kind == 'attention' else 'MLP'}, {_show(self.of_layer)} of a layer's parameters and "
            f"{_show(self.of_decoder)} of the decoder's"
        )
        return f"{step}; one in each of {self.blocks} layers is {_show(self.blocks * self.of_decoder)}"


def measure_reach(model: PreTrainedModel) -> list[Reach]:
    """What can go from each kind of block that the family lets shrink. The model needs shapes, no weights."""
    layer_parameters = count_layer_parameters(model)
    decoder = sum(layer_parameters)
    kinds = [kind for kind in NAMES if kind not in get_family(model.config).whole]
    own = {kind: [block for block in find_blocks(model) if block.key.kind == kind] for kind in kinds}
    # A family that keeps one kind whole is asked for the other alone.
    split = FREE if len(kinds) == 2 else {"attention": "10:0", "mlp": "0:10"}[kinds[0]]
    default = select_blocks(model, PruningConfig(split=split))
    found = []
    for kind, blocks in own.items():
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
