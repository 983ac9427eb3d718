"""Refinement: after its refit, every MLP is trained by itself to give what repair asks of it.

Least squares move the output projection alone. Here all of an MLP's weights move, by Adam on the squared error of its
output: no loss of the language model, no labels, no backward pass through another block, one MLP's gradients at a time.
How far to go from the weights it began with to those that training ended with is chosen on held-out tokens, for the end
may fit the text it saw; the weights it began with must not have seen them either. Steps hold rank-own tokens, so that
the weights differ a little between numbers of processes.

Sources: block-wise reconstruction, BRECQ (arXiv 2102.05426); of sparse language models, EBFT (arXiv 2402.12419).

Axes in tensor names: N tokens of all samples, D hidden width.
"""

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from gqaprune.distributed import sum_across_ranks
from gqaprune.processor import is_faster_in_bfloat16

_STEP_TOKENS = 1024
"""Tokens per step of Adam, all ranks together."""
_CHUNK_TOKENS = 4096
"""Tokens per forward when measuring."""
_WARM_UP = 0.05
"""Share of the steps."""
_SHARES = (0.25, 0.5, 0.75, 1.0)
"""Shares of the way from the refitted to the trained weights that are judged."""
_MASSIVE = 4.0
"""A token whose target's square is more than so many times the median weighs as if it were that: others count too."""
_LEAST = 1e-12
"""The same where every token counts as any other."""


@dataclass(frozen=True)
class RefinementOptions:
    """How MLPs are refined.

    Args:
        epochs: passes over the calibration tokens; 0 refines nothing.
        learning_rate: Adam's at its peak, in units of each matrix's root mean square; it warms up and decays to 0 as a
            cosine.

    Raises:
        ValueError: if a setting is out of its bounds.
    """

    epochs: int = 0
    learning_rate: float = 0.02

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ValueError(f"refinement's epochs must be at least 0, got {self.epochs}; 3 is a start")
        if not 0 < self.learning_rate <= 1:
            raise ValueError(
                "refinement's learning rate must be above 0 and at most 1, a share of the weights' size, "
                f"got {self.learning_rate}; 0.02 is a start"
            )


@dataclass(frozen=True)
class Refinement:
    """What refinement did to one MLP.

    Errors are squared, on held-out tokens, relative to the target's square, massive tokens weighing less.

    Args:
        error_before: error as refitted.
        error_after: the smallest one on the way to the trained weights; the same where the MLP stayed as refitted.
    """

    error_before: float
    error_after: float

    @property
    def is_kept(self) -> bool:
        """Whether the refined weights were kept."""
        return self.error_after < self.error_before


@dataclass(frozen=True)
class TokenPairs:
    """Inputs of an MLP and what it should give; this rank's share, which may be empty.

    Args:
        x_ND: inputs, in the model's type.
        y_ND: targets, float32.
    """

    x_ND: Tensor
    y_ND: Tensor


def refine_mlp(
    mlp: nn.Module,
    fit: TokenPairs,
    held: TokenPairs,
    options: RefinementOptions,
    seed: int,
    is_normed: bool = False,
) -> Refinement:
    """Train an MLP towards targets, in place; every rank ends with the same weights.

    Works on a float32 copy, with products in bfloat16 where the hardware is faster in it.

    Args:
        mlp: the module, already cut.
        fit: tokens to train on.
        held: tokens to judge on, which the module's weights have not seen; those of `fit` if no rank has any.
        options: how long and how fast.
        seed: of the order of the tokens.
        is_normed: whether the output passes a norm next: all tokens' relative errors count alike then.

    Returns:
        The errors before and after. The module keeps its weights where the new ones are no better or not finite.
    """
    judged = held if _sum({"tokens": float(len(held.x_ND))}, held)["tokens"] > 0 else fit
    median = float(fit.y_ND.square().sum(-1).median()) if len(fit.y_ND) else 0.0
    sums = _sum({"tokens": float(len(fit.y_ND)), "median": median * len(fit.y_ND)}, fit)
    limit = (_LEAST if is_normed else _MASSIVE) * sums["median"] / sums["tokens"]

    before = _measure_error(mlp, judged, limit)
    trained = copy.deepcopy(mlp).float()
    start = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    with torch.enable_grad():
        _train(trained.requires_grad_(True), fit, limit, int(sums["tokens"]), options, seed)
    end = trained.state_dict()
    refinement, candidate = Refinement(before, before), copy.deepcopy(mlp)
    for share in _SHARES:
        candidate.load_state_dict({name: torch.lerp(start[name], end[name], share) for name in start})
        error = _measure_error(candidate, judged, limit)  # judged as it will be stored
        if error < refinement.error_after:
            refinement = Refinement(before, error)
            mlp.load_state_dict(candidate.state_dict())
    return refinement


def _train(mlp: nn.Module, fit: TokenPairs, limit: float, tokens: int, options: RefinementOptions, seed: int) -> None:
    """Adam; at every step each rank takes an equal share of its tokens, and gradients are added over ranks."""
    weight_N = _weigh(fit.y_ND, limit)
    energy = _sum({"energy": float(weight_N @ fit.y_ND.square().sum(-1))}, fit)["energy"]
    if energy == 0:
        return
    steps_per_epoch = max(1, tokens // _STEP_TOKENS)
    parameters = dict(mlp.named_parameters())
    sizes = {name: float(parameter.detach().square().mean().sqrt()) for name, parameter in parameters.items()}
    adam = torch.optim.Adam(
        [{"params": [parameters[name]], "lr": options.learning_rate * size} for name, size in sizes.items()],
        betas=(0.9, 0.95),
        fused=True,
    )
    steps = steps_per_epoch * options.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min(1.0, (step + 1) / (_WARM_UP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    device = fit.x_ND.device
    for step_N in _draw_steps(len(fit.x_ND), steps_per_epoch, options.epochs, seed):
        indexes_N = step_N.to(device)
        with _choose_products(device):
            output_ND = mlp(fit.x_ND.index_select(0, indexes_N).float())
        # The slope of the weighted squared error, whose value is not needed.
        slope_ND = output_ND.detach().float() - fit.y_ND.index_select(0, indexes_N)
        slope_ND *= (2 * steps_per_epoch / energy) * weight_N[indexes_N, None]
        gradients = torch.autograd.grad(output_ND, list(parameters.values()), slope_ND.to(output_ND.dtype))
        for name, gradient in sum_across_ranks(dict(zip(parameters, gradients, strict=True))).items():
            parameters[name].grad = gradient
        adam.step()
        schedule.step()


def _draw_steps(tokens: int, steps_per_epoch: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Token indexes of every step, each token once per epoch; the same number of steps whatever the tokens."""
    generator = torch.Generator().manual_seed(seed)
    orders = (torch.randperm(tokens, generator=generator) for _ in range(epochs))
    return chain.from_iterable(order.tensor_split(steps_per_epoch) for order in orders)


@torch.no_grad()
def _measure_error(mlp: nn.Module, pairs: TokenPairs, limit: float) -> float:
    error = energy = 0.0
    for x_ND, y_ND in zip(pairs.x_ND.split(_CHUNK_TOKENS), pairs.y_ND.split(_CHUNK_TOKENS), strict=True):
        weight_N = _weigh(y_ND, limit)
        with _choose_products(x_ND.device):
            output_ND = mlp(x_ND)
        error += float(weight_N @ (output_ND.float() - y_ND).square().sum(-1))
        energy += float(weight_N @ y_ND.square().sum(-1))
    sums = _sum({"error": error, "energy": energy}, pairs)
    return sums["error"] / sums["energy"] if sums["energy"] > 0 else 0.0


def _weigh(y_ND: Tensor, limit: float) -> Tensor:
    return (limit / y_ND.square().sum(-1)).nan_to_num(1.0).clamp(max=1)


def _choose_products(device: torch.device) -> torch.autocast:
    """Context of an MLP's forward: float32 modules multiply in bfloat16, too, where the hardware is faster in it."""
    return torch.autocast(device.type, torch.bfloat16, enabled=_multiplies_bfloat16(device))


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and is_faster_in_bfloat16()


def _sum(values: dict[str, float], pairs: TokenPairs) -> dict[str, float]:
    """Add numbers over ranks, on the device that tokens are on."""
    tensors = {
        name: torch.tensor(value, dtype=torch.float64, device=pairs.x_ND.device) for name, value in values.items()
    }
    return {name: float(value) for name, value in sum_across_ranks(tensors).items()}
