"""The members of a unit's weights, and the criteria that need no text: magnitude and chance.

Axes in tensor names: U units, E elements of one unit, S columns of one, M members, O and I rows and columns of a
weight.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gqaprune.common.precision import sum_in_double
from gqaprune.models.architecture import Block
from gqaprune.placement.layer_store import find_store
from gqaprune.scoring.criteria.base import REDUCTIONS, Criterion, Scores


@dataclass(frozen=True)
class Member:
    """The units' part of one weight: consecutive rows of an input projection, or columns of the output projection.

    Biases are left out: they are few compared with the weights.

    Args:
        linear: the projection.
        units: number of units of the block.
        size: rows or columns of one unit.
        first_row: first row of the units; None for columns.
    """

    linear: nn.Linear
    units: int
    size: int
    first_row: int | None

    def split(self, values_OI: Tensor) -> Tensor:
        """Split values, one for each element of the weight, by unit, `[units, elements]`."""
        if self.first_row is None:
            columns_OUS: Tensor = values_OI.unflatten(1, (self.units, self.size))
            return columns_OUS.transpose(0, 1).flatten(1)
        return values_OI[self.first_row :][: self.units * self.size].reshape(self.units, -1)


def find_members(block: Block) -> list[Member]:
    """List the members of a block's units: those of each input projection, then the output projection."""
    members = []
    for projection in block.inputs:
        first_row = 0
        for size in projection.rows_per_unit:
            members.append(Member(projection.linear, block.units, size, first_row))
            first_row += block.units * size
    return [*members, Member(block.output, block.units, block.columns_per_unit, None)]


class Magnitude(Criterion):
    """Measures the magnitude of each member of a unit, and combines members by `reduction`."""

    needs_data = False
    goes_by_layer = True
    uses = ("reduction",)

    @abstractmethod
    def measure(self, weight_UE: Tensor) -> Tensor:
        """Measure the magnitude of each unit's elements, `[units]`."""

    @torch.no_grad()
    def score(self) -> Scores:
        """Measure and combine all members."""
        reduce, store = REDUCTIONS[self.scoring.reduction], find_store(self.run.model)
        scores = {}
        for block in self.run.blocks:
            with store.hold(block.key.layer):
                sizes = [self.measure(member.split(member.linear.weight).float()) for member in find_members(block)]
                scores[block.key] = reduce(torch.stack(sizes)).cpu()
        return scores


class MagnitudeL1(Magnitude):
    """`Σ |w|` over the elements of a member. Source: Li et al. 2017, arXiv 1608.08710."""

    def measure(self, weight_UE: Tensor) -> Tensor:
        """Sum absolute values."""
        return sum_in_double(weight_UE.abs(), 1)


class MagnitudeL2(Magnitude):
    """`Σ w²` over the elements of a member, without the root, so that members add up to the unit's `Σ w²`.

    Source: LLM-Pruner's `l2` (arXiv 2305.11627).
    """

    def measure(self, weight_UE: Tensor) -> Tensor:
        """Sum squares."""
        return sum_in_double(weight_UE.square(), 1)


class Random(Criterion):
    """Uniform scores in [0, 1) from `seed`: the baseline that any criterion has to beat."""

    needs_data = False
    goes_by_layer = True
    uses_seed = True

    def score(self) -> Scores:
        """Draw scores block by block."""
        generator = torch.Generator().manual_seed(self.run.calibration.seed)
        return {
            block.key: torch.rand(block.units, generator=generator, dtype=torch.float64) for block in self.run.blocks
        }
