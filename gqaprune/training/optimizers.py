"""Optimizers of the parameters that pruning left: weight decay, learning rate, gradient clipping."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PreTrainedModel, get_scheduler

from gqaprune.common.errors import first_line
from gqaprune.models.wrapping import unwrap_name


@dataclass(frozen=True)
class OptimizerConfig:
    """Choose an optimizer and how its learning rate changes.

    Args:
        factory: builds the optimizer from groups of parameters.
        schedule: course of the learning rate after the warm-up, down to 0 (`cosine`, `linear`) or `constant`.
        warmup_steps: optimizer steps before the one with the full learning rate, each with more than the one before;
            None takes a twentieth of all. No step has a learning rate of 0, which would change nothing.
    """

    factory: Callable[[Any], Optimizer]
    schedule: str = "cosine"
    warmup_steps: int | None = None

    def build(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], steps: int, flattened: Collection[str] = ()
    ) -> tuple[Optimizer, LRScheduler]:
        """Build optimizer and schedule.

        Args:
            named_parameters: all of the model's; those that do not require gradients are left out.
            steps: optimizer steps that the schedule takes to its end.
            flattened: names of matrices that FSDP1 stores as vectors.
        """
        optimizer = self.factory(group_parameters(named_parameters, flattened))
        name = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        warmup = steps // 20 if self.warmup_steps is None else self.warmup_steps
        course = get_scheduler(name, optimizer, warmup + 1, steps + 1)  # begins and ends at 0, outside of the run
        assert isinstance(course, LambdaLR)
        (factor,) = {id(own): own for own in course.lr_lambdas}.values()
        return optimizer, LambdaLR(optimizer, lambda step: factor(step + 1))

    def rehearse(self) -> Optimizer:
        """Take a step with the optimizer of a stand-in, a matrix and a vector, before any work.

        Raises:
            ValueError: if the optimizer refuses its settings, such as a learning rate below 0, or what it would train.
        """
        stand_ins = {"matrix": nn.Parameter(torch.ones(2, 2)), "vector": nn.Parameter(torch.ones(2))}
        for stand_in in stand_ins.values():
            stand_in.grad = torch.ones_like(stand_in)
        try:
            with torch.random.fork_rng([]):  # the run's own numbers stay what they are
                optimizer, _ = self.build(stand_ins.items(), steps=1)
                optimizer.step()
        except Exception as error:  # whatever an optimizer of anybody's raises
            reason = first_line(error).rstrip(".")
            raise ValueError(f"model.optimizer cannot train: {reason}; torch.optim.AdamW with lr 1e-5 can") from None
        return optimizer


def group_parameters(
    named_parameters: Iterable[tuple[str, nn.Parameter]], flattened: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Group the trained parameters: matrices with the optimizer's own weight decay, vectors without any.

    Args:
        named_parameters: parameters, some of which may not require gradients.
        flattened: names of matrices that FSDP1 stores as vectors.
    """
    matrices: list[Tensor] = []
    vectors: list[Tensor] = []
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            is_matrix = parameter.ndim > 1 or unwrap_name(name) in flattened
            (matrices if is_matrix else vectors).append(parameter)
    groups: list[dict[str, Any]] = [{"params": matrices, "name": "matrices"}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0, "name": "vectors"})
    return groups


def name_matrices(named_parameters: Iterable[tuple[str, nn.Parameter]]) -> set[str]:
    """Name the parameters that are matrices, while FSDP1 has not flattened them."""
    return {name for name, parameter in named_parameters if parameter.ndim > 1}


def clip_gradients(model: PreTrainedModel, optimizer: Optimizer, bound: float, is_by_norm: bool) -> None:
    """Clip the gradients of an optimizer's parameters in place.

    Args:
        model: that they belong to; one that FSDP1 wraps adds up the norm over devices.
        optimizer: whose step comes next.
        bound: largest norm of all gradients together, or largest absolute value of each; 0 does nothing.
        is_by_norm: which of both.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if bound <= 0:
        return
    if not is_by_norm:
        nn.utils.clip_grad_value_(parameters, bound)
    elif isinstance(model, FullyShardedDataParallel):
        model.clip_grad_norm_(bound)
    else:
        nn.utils.clip_grad_norm_(parameters, bound)
