"""The last step of repair: low-rank changes to all projections, trained towards what the dense model predicted.

Least squares and refinement work block by block; here the projections of all decoder layers move together, by the
divergence from the dense model's next-token distributions on calibration text. Labels take no part. What the dense
model predicts is noted before the first cut: its likeliest tokens, so that it need not stay. Weights change by adapters
of low rank, which take little memory; in the end all, half or none of their change is added to the weights, whichever
is best on held-out windows.

Sources: soft targets, Hinton et al. 2015 (arXiv 1503.02531); low-rank adapters, Hu et al. 2021 (arXiv 2106.09685).

Axes in tensor names: B samples, T tokens, K likeliest tokens, R rank, I inputs and O outputs of a projection.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gqaprune.common.console import console, track
from gqaprune.common.distributed import add_across_ranks, get_rank_and_world_size, sum_across_ranks
from gqaprune.common.precision import multiply_exactly
from gqaprune.common.stage_cache import StageCache, StageResult
from gqaprune.models.architecture import get_layers
from gqaprune.models.families import get_family
from gqaprune.models.gates import freeze_parameters
from gqaprune.models.soft_targets import Predictions, measure_divergence_from_top, predict_likeliest
from gqaprune.placement.layer_store import find_store
from gqaprune.surgery.products import multiply_in
from gqaprune.surgery.repair_config import RepairConfig

TOP_K = 64
"""Likeliest tokens that are noted of every prediction."""
RANK = 32
"""Of the change to each projection, at most."""
PASSES = 3
"""Over the text at most."""
STEP_WINDOWS = 2
"""Windows per step of AdamW, all ranks together, where there are not more ranks."""
_WARM_UP = 0.05
"""Share of the steps."""


@dataclass(frozen=True)
class Distillation:
    """What the last step did.

    Args:
        tokens: trained on, passes counted.
        divergence_before: KL(dense ‖ pruned) on held-out windows, nats per token, as the blocks were repaired.
        divergence_after: the same with the whole change or half of it, whichever gives less, still beside the weights;
            where it is no less, the weights stayed as they were.
    """

    tokens: int
    divergence_before: float
    divergence_after: float

    @property
    def is_kept(self) -> bool:
        """Whether the trained weights were kept."""
        return self.divergence_after < self.divergence_before

    def describe(self) -> str:
        """What it did, in a sentence."""
        change = f"{self.divergence_before:.4f} → {self.divergence_after:.4f} nats per token on held-out windows"
        kept = "" if self.is_kept else "; the weights before it are kept"
        return f"distillation: {self.tokens:,} tokens, divergence from the dense model {change}{kept}"


def split_windows(batches: Sequence[Tensor], held_out: set[int], tokens: int) -> tuple[Tensor, Tensor]:
    """Windows to train on, from all over the text, and windows to judge on; of a single batch both are the same.

    Windows of another length than the first are left out.

    Args:
        batches: calibration token ids, each `[batch, tokens]`.
        held_out: indexes of the batches to judge on.
        tokens: to train on at most, but for one window.

    Returns:
        Token ids, each `[windows, tokens]`.
    """
    length = batches[0].shape[1]
    own = {index: batch for index, batch in enumerate(batches) if batch.shape[1] == length}
    judged = [batch for index, batch in own.items() if index in held_out] or [batches[0]]
    trained = [batch for index, batch in own.items() if index not in held_out] or judged
    windows_BT = torch.cat(trained)
    count = min(len(windows_BT), max(1, tokens // length))
    return windows_BT[[index * len(windows_BT) // count for index in range(count)]], torch.cat(judged)


@dataclass(frozen=True)
class Lessons:
    """What the dense model predicted, on the CPU.

    Args:
        windows_BT: windows to train on, then windows to judge on.
        trained: how many are trained on.
        taught: predictions for all: log-probabilities in float16 and tokens in int32, each `[windows, tokens - 1, K]`.
    """

    windows_BT: Tensor
    trained: int
    taught: Predictions


@dataclass(frozen=True)
class _Adapter:
    """A change of low rank to a projection's weight: `size · up · down`, in float32, nothing to begin with.

    The size is the weight's root mean square over the root of its inputs, so that one learning rate does for all.
    """

    projection: nn.Linear
    down_RI: Tensor
    up_OR: Tensor
    size: float

    @classmethod
    def begin(cls, projection: nn.Linear, generator: torch.Generator) -> "_Adapter":
        outputs, inputs = projection.weight.shape
        rank, device = min(RANK, inputs, outputs), projection.weight.device
        down_RI = torch.randn(rank, inputs, generator=generator).to(device).requires_grad_()
        up_OR = torch.zeros(outputs, rank, device=device).requires_grad_()
        root_mean_square = float(projection.weight.detach().float().square().mean().sqrt())
        return cls(projection, down_RI, up_OR, root_mean_square / math.sqrt(inputs))

    def __call__(self, _: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        narrow_BTR = nn.functional.linear(inputs[0], self.down_RI.to(inputs[0])) * self.size
        return output + nn.functional.linear(narrow_BTR, self.up_OR.to(narrow_BTR))

    @torch.no_grad()
    def fold(self, times: float) -> None:
        """Add the change to the weight, so many times."""
        weight = self.projection.weight
        weight.data = (weight.data.float() + times * self.size * self.up_OR @ self.down_RI).to(weight.dtype)


def can_distill(model: PreTrainedModel, config: RepairConfig) -> bool:
    """Whether the decoder is to be trained, and can be; why not is said.

    Args:
        model: the dense causal LM.
        config: of repair.
    """
    if not config.distills:
        return False
    is_whole = find_store(model).is_in_memory
    if not is_whole and get_rank_and_world_size()[0] == 0:
        console.print(
            "repair: no distillation, for layers are not in memory; pruning.repair.distill_tokens 0 leaves it out"
        )
    return is_whole


def _find_projections(model: PreTrainedModel) -> list[nn.Linear]:
    """Projections of all blocks, in the model's order."""
    layouts = get_family(model.config).layouts.values()
    names = {name for layout in layouts for name in (*layout.inputs, layout.output)}
    named = get_layers(model).named_modules()
    return [module for name, module in named if name.split(".")[-1] in names and isinstance(module, nn.Linear)]


@multiply_exactly()
def note_lessons(model: PreTrainedModel, trained_BT: Tensor, judged_BT: Tensor, stages: StageCache) -> Lessons:
    """Note the dense model's likeliest next tokens.

    Args:
        model: the dense causal LM.
        trained_BT: windows to train on.
        judged_BT: windows to judge on.
        stages: of the dense model and its text.
    """
    windows_BT = torch.cat([trained_BT, judged_BT])

    def do() -> StageResult:
        return StageResult(tensors=_note_predictions(model, windows_BT)._asdict())

    stage = stages.recall("predictions of the dense model", {"windows": [len(trained_BT), len(judged_BT)]}, do)
    return Lessons(windows_BT, len(trained_BT), Predictions(**stage.tensors))


def _note_predictions(model: PreTrainedModel, windows_BT: Tensor) -> Predictions:
    """All ranks' predictions, each rank having made its own."""
    rank, world_size = get_rank_and_world_size()
    top_k = min(TOP_K, model.get_input_embeddings().weight.shape[0])
    shape = (len(windows_BT), windows_BT.shape[1] - 1, top_k)
    noted = Predictions(torch.zeros(shape, dtype=torch.float16), torch.zeros(shape, dtype=torch.int32))
    with freeze_parameters(model):
        for index in track(range(rank, len(windows_BT), world_size), "predictions of the dense model", "windows"):
            window_1T = windows_BT[index : index + 1].to(model.device)
            for store, value in zip(noted, predict_likeliest(model, window_1T, top_k), strict=True):
                store[index] = value[0].to(store)
    add_across_ranks(noted, model.device)
    return noted


@multiply_exactly()
def distill(model: PreTrainedModel, lessons: Lessons, config: RepairConfig, seed: int) -> Distillation:
    """Train a model's projections towards noted predictions, in place; every rank ends with the same weights.

    Args:
        model: the pruned and repaired causal LM, whole on every rank.
        lessons: what the dense model predicted.
        config: how long, how fast and in which products.
        seed: of the adapters and of the order of the windows.

    Raises:
        ValueError: if the loss is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    adapters = [_Adapter.begin(projection, generator) for projection in _find_projections(model)]
    judged = range(lessons.trained, len(lessons.windows_BT))
    with freeze_parameters(model):
        before = _measure(model, lessons, judged, config)
        with _adapt(adapters):
            with torch.enable_grad():
                tokens = _train(model, adapters, lessons, config, generator)
            whole = _measure(model, lessons, judged, config)
            for adapter in adapters:
                adapter.up_OR.data *= 0.5
            half = _measure(model, lessons, judged, config)
    after = min(whole, half)
    if after < before:
        for adapter in adapters:
            adapter.fold(2.0 if whole == after else 1.0)
    return Distillation(tokens, before, after)


@contextmanager
def _adapt(adapters: Sequence[_Adapter]) -> Iterator[None]:
    """Have projections give what they would with their changes."""
    with ExitStack() as stack:
        for adapter in adapters:
            stack.callback(adapter.projection.register_forward_hook(adapter).remove)
        yield


def _train(
    model: PreTrainedModel,
    adapters: Sequence[_Adapter],
    lessons: Lessons,
    config: RepairConfig,
    generator: torch.Generator,
) -> int:
    """AdamW over the windows in passes; at every step each rank takes its own, and gradients are added over ranks."""
    rank, world_size = get_rank_and_world_size()
    parameters = [part for adapter in adapters for part in (adapter.down_RI, adapter.up_OR)]
    adam = torch.optim.AdamW(parameters, config.distill_learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    per_step = max(STEP_WINDOWS, world_size)
    count, length = lessons.trained, lessons.windows_BT.shape[1]
    drawn = list(_draw(count, min(PASSES * count, max(per_step, config.distill_tokens // length)), generator))
    steps = math.ceil(len(drawn) / per_step)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min(1.0, (step + 1) / (_WARM_UP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    for step in track(range(steps), "repair: distillation", f"x {per_step} windows"):
        chosen = drawn[step * per_step : (step + 1) * per_step]
        for index in chosen[rank::world_size]:
            loss = _diverge(model, lessons, index, config) / len(chosen)
            if not torch.isfinite(loss):
                raise ValueError(
                    f"the divergence from the dense model is not finite at step {step} of distillation: lower "
                    "repair.distill_learning_rate, or set repair.distill_tokens to 0"
                )
            loss.backward()
        for parameter in parameters:
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = sum_across_ranks({"gradient": gradient})["gradient"]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        adam.step()
        adam.zero_grad()
        schedule.step()
    return len(drawn) * length


def _draw(count: int, drawn: int, generator: torch.Generator) -> Iterator[int]:
    """Places of so many windows, each once before any is drawn again."""
    while drawn > 0:
        order = torch.randperm(count, generator=generator).tolist()[:drawn]
        yield from order
        drawn -= len(order)


def _diverge(model: PreTrainedModel, lessons: Lessons, index: int, config: RepairConfig) -> Tensor:
    """Divergence from what was predicted for a window, mean over its tokens."""
    device = model.device
    with multiply_in(config.products, device):
        logits_1TV = model(input_ids=lessons.windows_BT[index, None].to(device), use_cache=False).logits[:, :-1]
    log_probability, token = (part[index, None].to(device) for part in lessons.taught)
    return measure_divergence_from_top(logits_1TV, Predictions(log_probability.float(), token.long()))


@torch.no_grad()
def _measure(model: PreTrainedModel, lessons: Lessons, windows: Sequence[int], config: RepairConfig) -> float:
    """Mean divergence over windows, all ranks' together."""
    rank, world_size = get_rank_and_world_size()
    own = [_diverge(model, lessons, index, config).double() for index in windows[rank::world_size]]
    total = torch.stack([*own, torch.zeros((), dtype=torch.float64, device=model.device)]).sum()
    return float(sum_across_ranks({"total": total})["total"]) / len(windows)
