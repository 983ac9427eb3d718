"""LLM-Pruner's Taylor criteria over weights and their gradients (arXiv 2305.11627).

Notation: samples n of an accumulation a, `g_n` the gradient of a sample's mean loss, `g = Σ_{n∈a} g_n`, and
`h = Σ_{n∈a} g_n²`, the diagonal Hessian. Each member of a unit (its rows of one input projection, its output columns)
contributes the criterion's formula, summed over accumulations, and `reduction` combines the members. LLM-Pruner takes
the mean over samples instead of the sum, a constant factor. Here a KV head is scored with the query heads that read it.

Each weight's gradient is used and freed as soon as the backward pass has computed it. An accumulation of several passes
keeps partial sums until its last pass: per weight for `param_first` and `param_mix`, which take absolute values of the
sum, and per unit otherwise.

Axes in tensor names: B samples, U units, E elements of one unit, M members.
"""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from gqaprune.common.precision import find_double_device, sum_in_double
from gqaprune.models.layerwise import run_decoder
from gqaprune.models.losses import differentiate_losses
from gqaprune.plan import BlockKey
from gqaprune.scoring.criteria.backward import BackwardCriterion
from gqaprune.scoring.criteria.base import REDUCTIONS, Scores, ScoringConfig, ScoringRun
from gqaprune.scoring.criteria.weights import Member, find_members


class GradientCriterion(BackwardCriterion):
    """Sums a formula of weights and their gradients for each member of a unit."""

    uses = ("reduction",)
    by_sample: ClassVar[bool] = False
    """Whether the formula needs the gradient of each sample, and so one backward pass per sample."""

    def __init__(self, run: ScoringRun, scoring: ScoringConfig) -> None:
        super().__init__(run, scoring)
        self.members = {block.key: find_members(block) for block in run.blocks}
        self.sums = {
            block.key: torch.zeros(
                *(len(self.members[block.key]), block.units),
                dtype=torch.float64,
                device=find_double_device(block.output.weight.device),
            )
            for block in run.blocks
        }
        self.partial_sums: dict[tuple[BlockKey, int], Tensor] = {}
        self.is_last_pass = False

    @abstractmethod
    def measure(self, weight_UE: Tensor, gradient_UE: Tensor) -> Tensor:
        """Compute what one backward pass adds to the accumulation."""

    @abstractmethod
    def close(self, weight_UE: Tensor, total: Tensor) -> Tensor:
        """Compute a member's contribution from the accumulation's sum of `measure`, float64 `[units]`."""

    @contextmanager
    def prepare(self) -> Iterator[None]:
        """Compute gradients of the blocks' weights within the context, and pass each to `add_gradient`."""
        with ExitStack() as restored:
            for key, members in self.members.items():
                for linear in {member.linear for member in members}:
                    weight = linear.weight
                    restored.callback(setattr, weight, "grad", weight.grad)
                    weight.grad = None
                    weight.requires_grad_(True)
                    of_weight = {index: member for index, member in enumerate(members) if member.linear is linear}
                    handle = weight.register_post_accumulate_grad_hook(partial(self.add_gradient, key, of_weight))
                    restored.callback(handle.remove)
            yield

    def add(self, input_ids: Tensor, ends_accumulation: bool) -> Tensor:
        """Run the backward passes of one micro-batch."""
        passes = input_ids.split(1) if self.by_sample else (input_ids,)
        losses = []
        for index, pass_BT in enumerate(passes):
            self.is_last_pass = ends_accumulation and index == len(passes) - 1
            hidden_BTD = run_decoder(self.run.model, pass_BT)
            losses_B, gradient_BTD = differentiate_losses(self.run.model, hidden_BTD, pass_BT)
            hidden_BTD.backward(gradient_BTD)
            losses.append(losses_B)
        return torch.cat(losses)

    def add_gradient(self, key: BlockKey, members: dict[int, Member], weight: Tensor) -> None:
        """Use a weight's gradient as soon as it is computed, and free it."""
        assert weight.grad is not None
        gradient, weight.grad = weight.grad, None
        for index, member in members.items():
            weight_UE = member.split(weight.detach()).float()
            total = self.measure(weight_UE, member.split(gradient).float())
            if (key, index) in self.partial_sums:
                total += self.partial_sums.pop((key, index))
            if self.is_last_pass:
                self.sums[key][index] += self.close(weight_UE, total)
            else:
                self.partial_sums[key, index] = total

    def finish(self, sums: dict[BlockKey, Tensor]) -> Scores:
        """Combine the members."""
        reduce = REDUCTIONS[self.scoring.reduction]
        return {key: reduce(total_MU).cpu() for key, total_MU in sums.items()}


class ParamFirst(GradientCriterion):
    """`Σ |w·g|` over elements: first order, element by element.

    Unit: nats per token, summed over samples. Source: LLM-Pruner's `param_first`.
    """

    def measure(self, weight_UE: Tensor, gradient_UE: Tensor) -> Tensor:
        """Return the gradient."""
        return gradient_UE

    def close(self, weight_UE: Tensor, total: Tensor) -> Tensor:
        """Sum absolute products."""
        return sum_in_double((weight_UE * total).abs(), 1)


class ParamSecond(GradientCriterion):
    """`Σ |w·h·w|` over elements: second order, with the samples' squared gradients as the Hessian's diagonal.

    Unit: (nats per token)², summed over samples; it does not depend on accumulations. Source: LLM-Pruner's
    `param_second`.
    """

    by_sample = True

    def measure(self, weight_UE: Tensor, gradient_UE: Tensor) -> Tensor:
        """Compute the sample's contribution."""
        return sum_in_double((weight_UE * gradient_UE).square(), 1)

    def close(self, weight_UE: Tensor, total: Tensor) -> Tensor:
        """Return the sum."""
        return total


class ParamMix(GradientCriterion):
    """`Σ |w·g − ½ w·h·w|` over elements: first and second order together.

    Unit: nats per token, summed over samples. Source: LLM-Pruner's `param_mix`.
    """

    by_sample = True

    def measure(self, weight_UE: Tensor, gradient_UE: Tensor) -> Tensor:
        """Stack the gradient and its square, `[2, units, elements]`."""
        return torch.stack((gradient_UE, gradient_UE.square()))

    def close(self, weight_UE: Tensor, total: Tensor) -> Tensor:
        """Sum absolute differences."""
        first, second = weight_UE * total
        mix_UE: Tensor = first - 0.5 * weight_UE * second
        return sum_in_double(mix_UE.abs(), 1)


class Vectorize(GradientCriterion):
    """`|Σ w·g|` over elements: the first-order Taylor term of each member as a whole.

    Over the output columns alone it is the gate's Taylor term. Unit: nats per token, summed over samples. Source: the
    vector-wise importance of LLM-Pruner, whose code takes the absolute value per row or column of a member instead.
    """

    def measure(self, weight_UE: Tensor, gradient_UE: Tensor) -> Tensor:
        """Sum signed products."""
        return sum_in_double(weight_UE * gradient_UE, 1)

    def close(self, weight_UE: Tensor, total: Tensor) -> Tensor:
        """Return the absolute value of the accumulation's sum."""
        return total.abs()
