"""Refinement: after its refit, every MLP is trained by itself to give what repair asks of it.

Least squares move the output projection alone. Here all of an MLP's weights move, by Adam on the squared error of its
output: no loss of the language model, no labels, no backward pass through another block, one MLP's gradients at a time.
How far to go from the weights it began with to those that training ended with is chosen on held-out tokens, for the end
may fit the text it saw; the weights it began with must not have seen them either. In a step each rank takes its
own tokens, so that the weights differ a little between numbers of processes.

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
from gqaprune.surgery.products import multiply_in, settle_products
from gqaprune.surgery.repair_config import RepairConfig

STEP_TOKENS = 1024
"""Tokens per step of Adam, all ranks together."""
_CHUNK_TOKENS = 4096
"""Tokens per forward when measuring."""
TRAINING_BYTES = 18
"""Of a parameter in training: float32 weight, gradient and two moments, and the weight in bfloat16 for products."""
_WARM_UP = 0.05
"""Share of the steps."""
SHARES = (0.25, 0.5, 0.75, 1.0)
"""Shares of the way from the refitted to the trained weights that are judged."""
_MASSIVE = 4.0
"""A token whose target's square is more than so many times the median weighs as if it were that: others count too."""
_LEAST = 1e-12
"""The same where every token counts as any other."""


_TELLING = 1e-3
"""Share of the largest matrix's root mean square up to which a parameter's own counts as 0."""


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
        y_ND: targets, bfloat16 or float32; both on the MLP's device, or both in the host's memory.
    """

    x_ND: Tensor
    y_ND: Tensor

    def take(self, tokens: Tensor | slice, device: torch.device) -> tuple[Tensor, Tensor]:
        """Inputs, and targets in float32, of some tokens, on a device."""
        if isinstance(tokens, Tensor):
            tokens = tokens.to(self.x_ND.device)
        return self.x_ND[tokens].to(device), self.y_ND[tokens].to(device).float()

    def take_chunks(self, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """The same of all tokens, a chunk at a time."""
        for start in range(0, len(self.x_ND), _CHUNK_TOKENS):
            yield self.take(slice(start, start + _CHUNK_TOKENS), device)


def reserve_pairs(counts: tuple[int, int], width: int, mlp: nn.Module) -> tuple[TokenPairs, TokenPairs]:
    """Room for an MLP's tokens: on its device if training has what it needs beside them, else in the host's memory.

    Args:
        counts: of tokens to fit on, and of held-out ones.
        width: of inputs and targets, which are float32, of a bfloat16 model bfloat16.
        mlp: the module, still whole.
    """
    parameters = list(mlp.parameters())
    device, dtype = parameters[0].device, parameters[0].dtype
    wide = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    needed = sum(counts) * width * (dtype.itemsize + wide.itemsize)
    needed += TRAINING_BYTES * sum(parameter.numel() for parameter in parameters)
    place = device if needed < count_free_bytes(device) else torch.device("cpu")

    def reserve(count: int) -> TokenPairs:
        return TokenPairs(*(torch.empty(count, width, dtype=each, device=place) for each in (dtype, wide)))

    return reserve(counts[0]), reserve(counts[1])


def count_free_bytes(device: torch.device) -> float:
    """What this process may still take of a device's memory; infinite where the system does not say."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        allowed = total * torch.cuda.get_per_process_memory_fraction(device) - reserved
        return min(free, allowed) + reserved - torch.cuda.memory_allocated(device)
    found = re.search(r"^MemAvailable: *(\d+) kB$", _read_text("/proc/meminfo"), re.MULTILINE)
    return math.inf if found is None else int(found[1]) * 1024


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
    """Train an MLP towards targets, in place; every rank ends with the same weights.

    Works on a float32 copy, with products in the type of the config.

    Args:
        mlp: the module, already cut.
        fit: tokens to train on.
        held_out: tokens to judge on, which the module's weights have not seen; those of `fit` if no rank has any.
        config: how long and how fast.
        seed: of the order of the tokens.
        is_normed: whether the output passes a norm next: all tokens' relative errors count alike then.

    Returns:
        The errors before and after. The module keeps its weights where the new ones are no better or not finite.
    """
    device = next(mlp.parameters()).device
    config = settle_products(config, device)
    energy_N = torch.cat(
        [y_ND.square().sum(-1) for _, y_ND in fit.take_chunks(device)] or [torch.zeros(0, device=device)]
    )
    median = float(energy_N.median()) if len(energy_N) else 0.0
    sums = _sum({"tokens": len(energy_N), "median": median * len(energy_N), "held out": len(held_out.x_ND)}, device)
    limit = (_LEAST if is_normed else _MASSIVE) * sums["median"] / sums["tokens"]
    judged = held_out if sums["held out"] > 0 else fit

    before = _measure_error(mlp, judged, limit, config.products)
    trained = copy.deepcopy(mlp).float()
    with torch.enable_grad():
        _train(trained.requires_grad_(True), fit, energy_N, limit, int(sums["tokens"]), config, seed)
    start, end = mlp.state_dict(), trained.state_dict()

    def move(module: nn.Module, share: float) -> None:
        module.load_state_dict({name: torch.lerp(start[name].float(), end[name], share) for name in start})

    candidate, best, after = copy.deepcopy(mlp), 0.0, before
    for share in SHARES:
        move(candidate, share)
        error = _measure_error(candidate, judged, limit, config.products)  # judged as it will be stored
        if error < after:
            best, after = share, error
    if best > 0:
        move(mlp, best)
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
    """Adam; at every step each rank takes an equal share of its tokens, and gradients are added over ranks.

    Args:
        mlp: the module.
        fit: this rank's tokens.
        energy_N: the squares of their targets.
        limit: square from which on a token weighs less.
        tokens: how many all ranks have.
        config: how long and how fast.
        seed: of the order.
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
        # The slope of the weighted squared error, whose value is not needed.
        slope_ND = output_ND.detach().float() - y_ND
        slope_ND *= (2 * steps_per_epoch / energy) * weight_N[step_N.to(device), None]
        gradients = torch.autograd.grad(output_ND, list(parameters.values()), slope_ND.to(output_ND.dtype))
        for name, gradient in sum_across_ranks(dict(zip(parameters, gradients, strict=True))).items():
            parameters[name].grad = gradient
        adam.step()
        schedule.step()


def _measure_sizes(mlp: nn.Module) -> dict[str, float]:
    """Root mean square of each parameter; of zeros, which do not say how far they may move, that of the matrices."""
    sizes = {name: float(parameter.detach().square().mean().sqrt()) for name, parameter in mlp.named_parameters()}
    largest = max(sizes[name] for name, parameter in mlp.named_parameters() if parameter.ndim > 1)
    return {name: size if size > _TELLING * largest else largest for name, size in sizes.items()}


def _draw_steps(tokens: int, steps_per_epoch: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Token indexes of every step, each token once per epoch; the same number of steps whatever the tokens."""
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
    """Add numbers over ranks, on the device that works."""
    tensors = {name: torch.tensor(value, dtype=torch.float64, device=device) for name, value in values.items()}
    return {name: float(value) for name, value in sum_across_ranks(tensors).items()}
