"""Distil the dense model into the repaired one, as the last step of repair, with low-rank adapters on all projections.

Least squares and refinement work block by block. Distillation trains the projections of all decoder layers together, to
minimise the divergence from the dense model's next-token distributions on calibration text. No labels are used. The
dense model's most likely tokens are recorded before the first cut, so it need not stay in memory. Adapters keep the
memory of training small. At the end all, half or none of their change is added to the weights, whichever has the least
divergence on held-out windows.

Sources: soft targets, Hinton et al. 2015 (arXiv 1503.02531); low-rank adapters, Hu et al. 2021 (arXiv 2106.09685).

Axes in tensor names: B samples, T tokens, K most likely tokens, V vocabulary, R rank, I inputs and O outputs of a
projection.
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
from gqaprune.common.precision import multiply_exactly, to_double
from gqaprune.common.stage_cache import StageCache, StageResult
from gqaprune.models.architecture import get_layers
from gqaprune.models.families import get_family
from gqaprune.models.gates import freeze_parameters
from gqaprune.models.soft_targets import Predictions, measure_divergence_from_top, predict_likeliest
from gqaprune.placement.layer_store import find_store
from gqaprune.surgery.products import multiply_in
from gqaprune.surgery.repair_config import RepairConfig

TOP_K = 64
"""Most likely tokens recorded for each prediction."""
RANK = 32
"""Largest rank of the change to a projection."""
PASSES = 3
"""Largest number of passes over the text."""
STEP_WINDOWS = 2
"""Windows per step of AdamW over all ranks; at least one per rank."""
_WARM_UP = 0.05
"""Share of the steps in which the learning rate warms up."""


@dataclass(frozen=True)
class Distillation:
    """Result of distillation.

    Args:
        tokens: tokens trained on, counted once per pass.
        divergence_before: KL(dense ‖ pruned) before distillation, in nats per token of held-out windows.
        divergence_after: the same with the whole change or with half of it, whichever is less, measured with the
            change in adapters. If it is not less than before, the weights were left unchanged.
    """

    tokens: int
    divergence_before: float
    divergence_after: float

    @property
    def is_kept(self) -> bool:
        """Whether the trained weights were kept."""
        return self.divergence_after < self.divergence_before

    def describe(self) -> str:
        """Describe the result in one line."""
        change = f"{self.divergence_before:.4f} → {self.divergence_after:.4f} nats per token on held-out windows"
        kept = "" if self.is_kept else "; no improvement, so the weights are unchanged"
        return f"distillation: {self.tokens:,} tokens, divergence from the dense model {change}{kept}"


def split_windows(batches: Sequence[Tensor], held_out: set[int], tokens: int) -> tuple[Tensor, Tensor]:
    """Split calibration text into windows to train on, spread over the text, and windows to judge on.

    If there is a single batch, both are the same. Windows whose length differs from the first are left out.

    Args:
        batches: calibration token ids, each `[batch, tokens]`.
        held_out: indexes of the batches to judge on.
        tokens: largest number of tokens to train on; at least one window is taken.

    Returns:
        Token ids to train on and to judge on, each `[windows, tokens]`.
    """
    length = batches[0].shape[1]
    usable = {index: batch for index, batch in enumerate(batches) if batch.shape[1] == length}
    judged = [batch for index, batch in usable.items() if index in held_out] or [batches[0]]
    trained = [batch for index, batch in usable.items() if index not in held_out] or judged
    windows_BT = torch.cat(trained)
    count = min(len(windows_BT), max(1, tokens // length))
    return windows_BT[[index * len(windows_BT) // count for index in range(count)]], torch.cat(judged)


@dataclass(frozen=True)
class DensePredictions:
    """The dense model's predictions, on the CPU.

    Args:
        windows_BT: token ids of the windows to train on, followed by those to judge on.
        trained: number of windows to train on.
        top: most likely tokens for all windows, int32, with their log-probabilities, float16; each
            `[windows, tokens - 1, K]`.
    """

    windows_BT: Tensor
    trained: int
    top: Predictions


@dataclass(frozen=True)
class _Adapter:
    """A low-rank change to a projection's weight, `size · up · down` in float32, initially zero.

    `size` is the root mean square of the weight divided by the square root of its inputs, so that one learning rate
    suits all projections.
    """

    projection: nn.Linear
    down_RI: Tensor
    up_OR: Tensor
    size: float

    @classmethod
    def create(cls, projection: nn.Linear, generator: torch.Generator) -> "_Adapter":
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
    def merge(self, scale: float) -> None:
        """Add `scale` times the change to the weight."""
        weight = self.projection.weight
        weight.data = (weight.data.float() + scale * self.size * self.up_OR @ self.down_RI).to(weight.dtype)


def can_distill(model: PreTrainedModel, config: RepairConfig) -> bool:
    """Return whether the config asks for distillation and the model allows it; if not, say why on the console.

    Args:
        model: the dense causal LM.
        config: settings of repair.
    """
    if not config.distills:
        return False
    is_in_memory = find_store(model).is_in_memory
    if not is_in_memory and get_rank_and_world_size()[0] == 0:
        console.print(
            "repair: distillation is skipped, because not all layers are in memory; "
            "set pruning.repair.distill_tokens to 0 to hide this message"
        )
    return is_in_memory


def _find_projections(model: PreTrainedModel) -> list[nn.Linear]:
    """List the projections of all blocks, in the model's order."""
    layouts = get_family(model.config).layouts.values()
    names = {name for layout in layouts for name in (*layout.inputs, layout.output)}
    named = get_layers(model).named_modules()
    return [module for name, module in named if name.split(".")[-1] in names and isinstance(module, nn.Linear)]


@multiply_exactly()
def record_predictions(
    model: PreTrainedModel, trained_BT: Tensor, judged_BT: Tensor, stages: StageCache
) -> DensePredictions:
    """Record the dense model's most likely next tokens.

    Args:
        model: the dense causal LM.
        trained_BT: token ids to train on.
        judged_BT: token ids to judge on.
        stages: stages of a run with this model and this text, which keep the predictions.
    """
    windows_BT = torch.cat([trained_BT, judged_BT])

    def predict() -> StageResult:
        return StageResult(tensors=_predict(model, windows_BT)._asdict())

    stage = stages.recall("predictions of the dense model", {"windows": [len(trained_BT), len(judged_BT)]}, predict)
    return DensePredictions(windows_BT, len(trained_BT), Predictions(**stage.tensors))


def _predict(model: PreTrainedModel, windows_BT: Tensor) -> Predictions:
    """Predict the most likely tokens of all windows; each rank runs a share of them, and every rank gets all."""
    rank, world_size = get_rank_and_world_size()
    top_k = min(TOP_K, model.get_input_embeddings().weight.shape[0])
    shape = (len(windows_BT), windows_BT.shape[1] - 1, top_k)
    top = Predictions(torch.zeros(shape, dtype=torch.float16), torch.zeros(shape, dtype=torch.int32))
    with freeze_parameters(model):
        for index in track(range(rank, len(windows_BT), world_size), "predictions of the dense model", "windows"):
            window_1T = windows_BT[index : index + 1].to(model.device)
            for recorded, predicted in zip(top, predict_likeliest(model, window_1T, top_k), strict=True):
                recorded[index] = predicted[0].to(recorded)
    add_across_ranks(top, model.device)
    return top


@multiply_exactly()
def distill(model: PreTrainedModel, dense: DensePredictions, config: RepairConfig, seed: int) -> Distillation:
    """Train a model's projections towards the dense model's predictions in place; every rank gets the same weights.

    Args:
        model: the pruned and repaired causal LM, whole on every rank.
        dense: predictions of the dense model.
        config: tokens, learning rate and dtype of products.
        seed: seed of the adapters and of the order of the windows.

    Raises:
        ValueError: if the loss is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    adapters = [_Adapter.create(projection, generator) for projection in _find_projections(model)]
    judged = range(dense.trained, len(dense.windows_BT))
    with freeze_parameters(model):
        before = _measure(model, dense, judged, config)
        with _adapt(adapters):
            with torch.enable_grad():
                tokens = _train(model, adapters, dense, config, generator)
            whole = _measure(model, dense, judged, config)
            for adapter in adapters:
                adapter.up_OR.data *= 0.5
            half = _measure(model, dense, judged, config)
    after = min(whole, half)
    if after < before:
        for adapter in adapters:
            adapter.merge(2.0 if whole == after else 1.0)  # adapters hold half of the change by now
    return Distillation(tokens, before, after)


@contextmanager
def _adapt(adapters: Sequence[_Adapter]) -> Iterator[None]:
    """Add the adapters' changes to the outputs of the projections within the context."""
    with ExitStack() as stack:
        for adapter in adapters:
            stack.callback(adapter.projection.register_forward_hook(adapter).remove)
        yield


def _train(
    model: PreTrainedModel,
    adapters: Sequence[_Adapter],
    dense: DensePredictions,
    config: RepairConfig,
    generator: torch.Generator,
) -> int:
    """Train adapters by AdamW; in each step the ranks share the windows, and gradients are summed over ranks.

    Returns:
        Tokens trained on, counted once per pass.
    """
    rank, world_size = get_rank_and_world_size()
    parameters = [factor for adapter in adapters for factor in (adapter.down_RI, adapter.up_OR)]
    adam = torch.optim.AdamW(parameters, config.distill_learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    per_step = max(STEP_WINDOWS, world_size)
    count, length = dense.trained, dense.windows_BT.shape[1]
    drawn = list(_draw(count, min(PASSES * count, max(per_step, config.distill_tokens // length)), generator))
    steps = math.ceil(len(drawn) / per_step)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: min(1.0, (step + 1) / (_WARM_UP * steps)) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    for step in track(range(steps), "repair: distillation", f"x {per_step} windows"):
        chosen = drawn[step * per_step : (step + 1) * per_step]
        for index in chosen[rank::world_size]:
            loss = _compute_divergence(model, dense, index, config) / len(chosen)
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
    """Draw `drawn` of `count` windows in random order, each once before any is drawn again."""
    while drawn > 0:
        order = torch.randperm(count, generator=generator).tolist()[:drawn]
        yield from order
        drawn -= len(order)


def _compute_divergence(model: PreTrainedModel, dense: DensePredictions, index: int, config: RepairConfig) -> Tensor:
    """Compute the divergence from the dense model's predictions for one window, mean over its tokens, in nats."""
    device = model.device
    with multiply_in(config.products, device):
        logits_1TV = model(input_ids=dense.windows_BT[index, None].to(device), use_cache=False).logits[:, :-1]
    log_probability, token = (recorded[index, None].to(device) for recorded in dense.top)
    return measure_divergence_from_top(logits_1TV, Predictions(log_probability.float(), token.long()))


@torch.no_grad()
def _measure(model: PreTrainedModel, dense: DensePredictions, windows: Sequence[int], config: RepairConfig) -> float:
    """Measure the mean divergence over some windows, which the ranks share, in nats per token."""
    rank, world_size = get_rank_and_world_size()
    values = [to_double(_compute_divergence(model, dense, index, config)) for index in windows[rank::world_size]]
    total = torch.stack([*values, to_double(torch.zeros((), device=model.device))]).sum()
    return float(sum_across_ranks({"total": total})["total"]) / len(windows)
