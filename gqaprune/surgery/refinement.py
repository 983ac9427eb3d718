"""Refine each MLP after its refit: train all of its weights towards the targets of repair.

Least squares change only the output projection. Refinement trains all weights of an MLP by Adam on the squared error of
its output. It needs no loss of the language model, no labels, no backward pass through other blocks, and the gradients
of one MLP at a time. Trained weights may overfit, so held-out tokens choose how far to move from the initial to the
trained weights; the initial weights must not have been fitted to these tokens either. In a step each rank takes some of
its tokens, so the weights differ slightly between numbers of processes.

Sources: block-wise reconstruction, BRECQ (arXiv 2102.05426); of sparse language models, EBFT (arXiv 2402.12419).

Axes in tensor names: N tokens of all samples, D hidden width.
"""

import copy
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from gqaprune.common.distributed import sum_across_ranks
from gqaprune.common.precision import find_double_device
from gqaprune.surgery.products import multiply_in, settle_products
from gqaprune.surgery.repair_config import RepairConfig

STEP_TOKENS = 1024
"""Tokens per step of Adam over all ranks."""
_CHUNK_TOKENS = 4096
"""Tokens per forward when errors are measured."""
TRAINING_BYTES = 18
"""Bytes per trained parameter: float32 weight, gradient and two moments, and the weight in bfloat16 for products."""
_WARM_UP = 0.05
"""Share of the steps in which the learning rate warms up."""
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Interpolations between refitted (0) and trained (1) weights that are tried."""
_ENERGY_LIMIT = 4.0
"""Multiple of the median squared target above which a token has less weight, so that massive tokens do not dominate."""
_EQUAL_LIMIT = 1e-12
"""The same limit if all tokens should have the same weight."""
_ZERO_LIMIT = 1e-3
"""A parameter counts as 0 if its root mean square is at most this share of the largest matrix's."""


@dataclass(frozen=True)
class Refinement:
    """Result of refining one MLP.

    Errors are squared, on held-out tokens, relative to the squared target; massive tokens have less weight.

    Args:
        error_before: error of the refitted weights.
        error_after: smallest error between refitted and trained weights; the same if the refitted weights stay.
    """

    error_before: float
    error_after: float

    @property
    def is_kept(self) -> bool:
        """Whether the refined weights were kept."""
        return self.error_after < self.error_before


@dataclass(frozen=True)
class TokenPairs:
    """Inputs of an MLP and targets for its output: this rank's tokens, possibly none.

    Both tensors are on the MLP's device, or both are in the host's memory.

    Args:
        x_ND: inputs, in the model's dtype.
        y_ND: targets, bfloat16 or float32.
    """

    x_ND: Tensor
    y_ND: Tensor

    def take(self, tokens: Tensor | slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return inputs, and targets in float32, of some tokens on a device."""
        if isinstance(tokens, Tensor):
            tokens = tokens.to(self.x_ND.device)
        return self.x_ND[tokens].to(device), self.y_ND[tokens].to(device).float()

    def take_chunks(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and float32 targets of all tokens in chunks."""
        for start in range(0, len(self.x_ND), _CHUNK_TOKENS):
            yield self.take(slice(start, start + _CHUNK_TOKENS), device)


def reserve_pairs(counts: tuple[int, int], width: int, mlp: nn.Module) -> tuple[TokenPairs, TokenPairs]:
    """Allocate tensors for an MLP's tokens: on its device if training fits beside them, else in the host's memory.

    Targets are float32, or bfloat16 if the model is.

    Args:
        counts: numbers of tokens to fit on and of held-out tokens.
        width: width of inputs and of targets.
        mlp: the module, still dense.
    """
    parameters = list(mlp.parameters())
    device, dtype = parameters[0].device, parameters[0].dtype
    target_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    needed = sum(counts) * width * (dtype.itemsize + target_dtype.itemsize)
    needed += TRAINING_BYTES * sum(parameter.numel() for parameter in parameters)
    place = device if needed < count_free_bytes(device) else torch.device("cpu")

    def reserve(count: int) -> TokenPairs:
        return TokenPairs(*(torch.empty(count, width, dtype=kind, device=place) for kind in (dtype, target_dtype)))

    return reserve(counts[0]), reserve(counts[1])


def count_free_bytes(device: torch.device) -> float:
    """Count the bytes of a device's memory that this process can still allocate; infinite if that is unknown."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        allowed = total * torch.cuda.get_per_process_memory_fraction(device) - reserved
        return min(free, allowed) + reserved - torch.cuda.memory_allocated(device)
    available = re.search(r"^MemAvailable: *(\d+) kB$", _read_text("/proc/meminfo"), re.MULTILINE)
    return math.inf if available is None else int(available[1]) * 1024


def _read_text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def refine_mlp(
    mlp: nn.Module,
    fit: TokenPairs,
    held_out: TokenPairs,
    config: RepairConfig,
    seed: int,
    is_normed: bool = False,
) -> Refinement:
    """Train an MLP towards targets in place; every rank gets the same weights.

    A float32 copy is trained, with products in the config's dtype. The module keeps its weights if the trained ones are
    not better, or not finite.

    Args:
        mlp: the module, already cut.
        fit: tokens to train on.
        held_out: tokens to judge on, to which the module's weights have not been fitted. If no rank has any, `fit` is
            used.
        config: epochs, learning rate and dtype of products.
        seed: seed of the order of the tokens.
        is_normed: whether the model normalises the output. The relative errors of all tokens then have equal weight.

    Returns:
        The errors before and after.
    """
    device = next(mlp.parameters()).device
    config = settle_products(config, device)
    energy_N = torch.cat(
        [y_ND.square().sum(-1) for _, y_ND in fit.take_chunks(device)] or [torch.zeros(0, device=device)]
    )
    median = float(energy_N.median()) if len(energy_N) else 0.0
    sums = _sum({"tokens": len(energy_N), "median": median * len(energy_N), "held out": len(held_out.x_ND)}, device)
    limit = (_EQUAL_LIMIT if is_normed else _ENERGY_LIMIT) * sums["median"] / sums["tokens"]
    judged = held_out if sums["held out"] > 0 else fit

    before = _measure_error(mlp, judged, limit, config.products)
    trained = copy.deepcopy(mlp).float()
    with torch.enable_grad():
        _train(trained.requires_grad_(True), fit, energy_N, limit, int(sums["tokens"]), config, seed)
    start, end = mlp.state_dict(), trained.state_dict()

    def interpolate(module: nn.Module, share: float) -> None:
        module.load_state_dict({name: torch.lerp(start[name].float(), end[name], share) for name in start})

    candidate, best, after = copy.deepcopy(mlp), 0.0, before
    for share in SHARES:
        interpolate(candidate, share)  # rounded to the model's dtype, as it will be stored
        error = _measure_error(candidate, judged, limit, config.products)
        if error < after:
            best, after = share, error
    if best > 0:
        interpolate(mlp, best)
    return Refinement(before, after)


def _train(
    mlp: nn.Module,
    fit: TokenPairs,
    energy_N: Tensor,
    limit: float,
    tokens: int,
    config: RepairConfig,
    seed: int,
) -> None:
    """Train by Adam; in each step each rank takes an equal share of its tokens, and gradients are summed over ranks.

    Args:
        mlp: the module.
        fit: this rank's tokens.
        energy_N: squared norms of their targets.
        limit: squared norm above which a token has less weight.
        tokens: number of tokens of all ranks.
        config: epochs, learning rate and dtype of products.
        seed: seed of the order of the tokens.
    """
    weight_N, device = _weigh(energy_N, limit), energy_N.device
    energy = _sum({"energy": float(weight_N @ energy_N)}, device)["energy"]
    if energy == 0:
        return
    steps_per_epoch = max(1, tokens // STEP_TOKENS)
    parameters, sizes = dict(mlp.named_parameters()), _measure_sizes(mlp)
    adam = torch.optim.Adam(
        [{"params": [parameters[name]], "lr": config.learning_rate * size} for name, size in sizes.items()],
        betas=(0.9, 0.95),
        fused=True,
    )
    steps = steps_per_epoch * config.epochs
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min(1.0, (step + 1) / (_WARM_UP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    for step_N in _draw_steps(len(energy_N), steps_per_epoch, config.epochs, seed):
        x_ND, y_ND = fit.take(step_N, device)
        with multiply_in(config.products, device):
            output_ND = mlp(x_ND.float())
        # The gradient of the weighted squared error by the output; the error itself is not needed.
        output_grad_ND = output_ND.detach().float() - y_ND
        output_grad_ND *= (2 * steps_per_epoch / energy) * weight_N[step_N.to(device), None]
        gradients = torch.autograd.grad(output_ND, list(parameters.values()), output_grad_ND.to(output_ND.dtype))
        for name, gradient in sum_across_ranks(dict(zip(parameters, gradients, strict=True))).items():
            parameters[name].grad = gradient
        adam.step()
        schedule.step()


def _measure_sizes(mlp: nn.Module) -> dict[str, float]:
    """Measure the root mean square of each parameter, the scale of its learning rate.

    Parameters of zeros have no scale of their own and get the largest matrix's.
    """
    sizes = {name: float(parameter.detach().square().mean().sqrt()) for name, parameter in mlp.named_parameters()}
    largest = max(sizes[name] for name, parameter in mlp.named_parameters() if parameter.ndim > 1)
    return {name: size if size > _ZERO_LIMIT * largest else largest for name, size in sizes.items()}


def _draw_steps(tokens: int, steps_per_epoch: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Draw the token indexes of each step: every token once per epoch, in the same number of steps on all ranks."""
    generator = torch.Generator().manual_seed(seed)
    orders = (torch.randperm(tokens, generator=generator) for _ in range(epochs))
    return chain.from_iterable(order.tensor_split(steps_per_epoch) for order in orders)


@torch.no_grad()
def _measure_error(mlp: nn.Module, pairs: TokenPairs, limit: float, products: str) -> float:
    device, error, energy = next(mlp.parameters()).device, 0.0, 0.0
    for x_ND, y_ND in pairs.take_chunks(device):
        energy_N = y_ND.square().sum(-1)
        weight_N = _weigh(energy_N, limit)
        with multiply_in(products, device):
            output_ND = mlp(x_ND)
        error += float(weight_N @ (output_ND.float() - y_ND).square().sum(-1))
        energy += float(weight_N @ energy_N)
    sums = _sum({"error": error, "energy": energy}, device)
    return sums["error"] / sums["energy"] if sums["energy"] > 0 else 0.0


def _weigh(energy_N: Tensor, limit: float) -> Tensor:
    return (limit / energy_N).nan_to_num(1.0).clamp(max=1)


def _sum(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Sum numbers over ranks on a device."""
    device = find_double_device(device)
    tensors = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in values.items()}
    return {name: float(value) for name, value in sum_across_ranks(tensors).items()}
