"""Optimize the parameters that are left after pruning: weight decay, learning rate, gradient clipping."""

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
    """An optimizer and the course of its learning rate.

    Args:
        factory: builds the optimizer from groups of parameters.
        schedule: learning rate after the warm-up: falls to 0 (`cosine`, `linear`) or stays the same (`constant`).
        warmup_steps: number of optimizer steps over which the learning rate rises to its full value; None uses a
            twentieth of all steps. No step has a learning rate of 0, which would change nothing.
    """

    factory: Callable[[Any], Optimizer]
    schedule: str = "cosine"
    warmup_steps: int | None = None

    def build(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], steps: int, flattened: Collection[str] = ()
    ) -> tuple[Optimizer, LRScheduler]:
        """Build optimizer and schedule.

        Args:
            named_parameters: all parameters of the model; those that do not require gradients are left out.
            steps: optimizer steps of the whole schedule.
            flattened: names of matrices that FSDP1 stores as vectors.
        """
        optimizer = self.factory(group_parameters(named_parameters, flattened))
        name = "constant_with_warmup" if self.schedule == "constant" else self.schedule
        warmup = steps // 20 if self.warmup_steps is None else self.warmup_steps
        course = get_scheduler(name, optimizer, warmup + 1, steps + 1)  # it is 0 just before and just after the run
        assert isinstance(course, LambdaLR)
        (factor,) = {id(function): function for function in course.lr_lambdas}.values()
        return optimizer, LambdaLR(optimizer, lambda step: factor(step + 1))

    def rehearse(self) -> Optimizer:
        """Try one step of the optimizer on a small matrix and a vector, before any work.

        Raises:
            ValueError: if the optimizer refuses its settings, such as a learning rate below 0, or its parameters.
        """
        stand_ins = {"matrix": nn.Parameter(torch.ones(2, 2)), "vector": nn.Parameter(torch.ones(2))}
        for stand_in in stand_ins.values():
            stand_in.grad = torch.ones_like(stand_in)
        try:
            with torch.random.fork_rng([]):  # so that the run's random numbers stay the same
                optimizer, _ = self.build(stand_ins.items(), steps=1)
                optimizer.step()
        except Exception as error:  # an optimizer of another project can raise anything
            reason = first_line(error).rstrip(".")
            raise ValueError(f"model.optimizer cannot train: {reason}; try torch.optim.AdamW with lr 1e-5") from None
        return optimizer


def group_parameters(
    named_parameters: Iterable[tuple[str, nn.Parameter]], flattened: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Group the trained parameters: matrices with the optimizer's weight decay, vectors without any.

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
    """Return the names of parameters that are matrices; call it before FSDP1 flattens them."""
    return {name for name, parameter in named_parameters if parameter.ndim > 1}


def clip_gradients(model: PreTrainedModel, optimizer: Optimizer, bound: float, is_by_norm: bool) -> None:
    """Clip the gradients of an optimizer's parameters in place.

    Args:
        model: model that they belong to; one that FSDP1 wraps adds up the norm over devices.
        optimizer: optimizer whose step follows.
        bound: largest norm of all gradients together, or largest absolute value of each; 0 does nothing.
        is_by_norm: whether `bound` is a norm.
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
