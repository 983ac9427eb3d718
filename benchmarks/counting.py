"""Counts what really runs: floating-point operations of every stage, as torch's counter sees them and as it does not.

Beside products, torch's counter is taught attention on CPUs, factors, triangular and other solutions, and products that
are added in place, by the usual numbers of operations.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import PreTrainedModel

from gqaprune.common.stage_cache import StageCache
from gqaprune.data.calibration import CalibrationSet
from gqaprune.data.sampling import _Batch, _write_batches
from gqaprune.evaluation.perplexity import measure_perplexity
from gqaprune.models.architecture import Block, find_blocks
from gqaprune.plan import BlockKey, KeptUnits, PruningPlan
from gqaprune.planning.config import PruningConfig
from gqaprune.planning.costs import peaks
from gqaprune.planning.costs.base import Cost, Text, read_shape
from gqaprune.planning.costs.curves import cost_gated_damage, cost_repaired_damage
from gqaprune.planning.costs.repair import cost_cut, cost_distillation, cost_predictions
from gqaprune.planning.costs.scoring import CRITERIA, cost_importance, cost_outliers, cost_perplexity, cost_scores
from gqaprune.planning.costs.training import cost_recovery_step, cost_sampling
from gqaprune.planning.memory import read_sizes
from gqaprune.planning.selection import keep_everything, score_blocks, select_blocks
from gqaprune.scoring.damage import measure_damage_curves
from gqaprune.scoring.outliers import find_outliers
from gqaprune.scoring.repaired_damage import choose_judged, choose_levels, measure_repaired_damage
from gqaprune.scoring.scores import score_units
from gqaprune.scoring.sensitivity import SENSITIVITIES, measure_sensitivity
from gqaprune.surgery.cut import apply_plan
from gqaprune.surgery.distillation import distill, record_predictions, split_windows
from gqaprune.surgery.layer_damage import LayerDamageMeter
from gqaprune.surgery.repair import apply_plan_with_repair, choose_held_out
from gqaprune.surgery.repair_config import RepairConfig
from gqaprune.training.lora import add_adapters
from gqaprune.training.objective import Objective
from gqaprune.training.recovery import RecoveryConfig

HOLDOUT = RepairConfig().holdout
STEPS = 2
"""Of recovery, so that the optimizer's moments are there in one."""


def _count_solution(matrix: torch.Size, right: torch.Size, *_: Any, left: bool = True, **__: Any) -> float:
    return right.numel() * matrix[-1]


def _count_factor(matrix: torch.Size, *_: Any, **__: Any) -> float:
    return matrix.numel() * matrix[-1] / 3


aten = torch.ops.aten
UNSEEN: Mapping[Any, Callable[..., float]] = {
    aten.addmm_: lambda _, left, right, **__: 2 * left.numel() * right[-1],
    aten.linalg_cholesky_ex: _count_factor,
    aten.linalg_solve_triangular: _count_solution,
    aten.cholesky_inverse: lambda factor, *_, **__: 2 * _count_factor(factor),
    aten._linalg_solve_ex: lambda a, b, **__: 2 * _count_factor(a) + 2 * _count_solution(a, b),
    aten.cholesky_solve: lambda b, factor, *_, **__: 2 * _count_solution(factor, b),
}
"""Operators of float64 work that torch's counter does not see -> operations from shapes of arguments."""


def _count_attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> float:
    return sdpa_flop_count(query, key, value)


def _count_attention_backward(
    gradient: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> float:
    return sdpa_backward_flop_count(gradient, query, key, value)


ATTENTION: Mapping[Any, Callable[..., float]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _count_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _count_attention_backward,
}
"""Attention on CPUs, which torch's counter does not know."""


def _take_shapes(count: Callable[..., float]) -> Callable[..., int]:
    def wrapped(*arguments: Any, out_shape: Any = None, **keywords: Any) -> int:
        return round(count(*arguments, **keywords))

    return wrapped


@dataclass(frozen=True)
class Count:
    """Operations that ran.

    Args:
        seen: by torch's counter.
        unseen: of solvers, all in float64.
    """

    seen: float
    unseen: float


class _NoModules(nullcontext[None]):
    """Stands for torch's tracker of modules, whose hooks refuse a backward pass to inputs alone."""

    parents = ("Global",)


def count_flops(work: Callable[[], object]) -> Count:
    """Count the operations of a call."""
    mapping = {operator: _take_shapes(count) for operator, count in (UNSEEN | ATTENTION).items()}  # type: ignore[operator]
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    counter.mod_tracker = _NoModules()  # type: ignore[assignment]
    with counter:
        work()
    counts = counter.get_flop_counts().get("Global", {})
    unseen = sum(value for operator, value in counts.items() if operator in UNSEEN)
    return Count(float(sum(counts.values()) - unseen), float(unseen))


def measure_peak(work: Callable[[], object]) -> int:
    """Bytes that torch's CPU allocator has at most beyond what it had, while a call lasts."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(accumulate((size for _, size in changes), initial=0))


@dataclass(frozen=True)
class Stage:
    """A stage as it really runs, and what it should cost.

    Args:
        name: what it is.
        run: does it.
        cost: by formula.
        peak: bytes by formula, weights and all; None where there is none.
        copies: whether it works on a copy of the model.
    """

    name: str
    run: Callable[[], object]
    cost: Cost
    peak: float | None = None
    copies: bool = False


def make_levels(blocks: Sequence[Block]) -> dict[BlockKey, list[int]]:
    """Numbers of removed units at which each block is measured."""
    return {block.key: choose_levels(block.key.kind, block.units, block.units) for block in blocks}


def make_cut(model: PreTrainedModel) -> tuple[PruningPlan, dict[BlockKey, int]]:
    """A plan that removes a group of one layer's attention and a quarter of the channels of all but the first MLP.

    Returns:
        The plan, and the columns of output projections that stay where some go.
    """
    whole, layers, kept = keep_everything(model), [], {}
    for index, units in enumerate(whole.layers):
        groups, channels = units.groups, units.channels
        if index == 1:
            groups = groups[1:]
            columns = whole.geometry.ratios[index] * whole.geometry.head_dim
            kept[BlockKey(index, "attention")] = len(groups) * columns
        if index > 0:
            channels = channels[len(channels) // 4 :]
            kept[BlockKey(index, "mlp")] = len(channels)
        layers.append(KeptUnits(groups, channels))
    return PruningPlan(whole.geometry, tuple(layers)), kept


def prepare_stages(model: PreTrainedModel, windows_NT: Tensor, batch: int) -> list[Stage]:
    """Every stage on one model and text; the model is left as it was.

    Args:
        model: a dense causal LM in float32.
        windows_NT: token ids `[windows, tokens]`.
        batch: windows that pass the model together.
    """
    text = Text(len(windows_NT), windows_NT.shape[1], batch)
    return [
        *_list_scoring(model, windows_NT, text),
        *_list_damage(model, windows_NT, text),
        *_list_repair(model, windows_NT, text),
        *_list_training(model, windows_NT, text),
    ]


def _list_scoring(model: PreTrainedModel, windows_NT: Tensor, text: Text) -> list[Stage]:
    blocks, batches = find_blocks(model), windows_NT.split(text.batch)
    shape, sizes = read_shape(model.config, 4), read_sizes(model.config)
    labelled = {"text": [{"input_ids": own, "labels": own} for own in batches]}
    stages = [
        Stage(
            "perplexity",
            lambda: measure_perplexity(model, labelled),
            cost_perplexity(shape, text),
            peaks.peak_perplexity(sizes, 4, text),
        )
    ]
    for name in CRITERIA:
        for own, of in ((blocks, "all"), (blocks[3:-1], "middle")):
            cost = cost_scores(shape, text, own, name)
            peak = peaks.CRITERIA[name](sizes, 4, text) if of == "all" else None
            run = lambda n=name, b=own: score_units(model, b, batches, n)  # noqa: E731
            stages.append(Stage(f"scores, {name}, {of} blocks", run, cost, peak))
    stages.append(_prepare_default_scores(model, batches, text))
    cost, peak = cost_outliers(shape, text, blocks), peaks.peak_outliers(sizes, 4, text)
    stages.append(Stage("outliers", lambda: find_outliers(model, blocks, batches), cost, peak))
    for method in SENSITIVITIES:
        cost = cost_importance(shape, text, blocks, method)
        run = lambda m=method: measure_sensitivity(model, blocks, CalibrationSet(batches), m)  # noqa: E731
        stages.append(Stage(f"importance, {method}", run, cost))
    return stages


def _prepare_default_scores(model: PreTrainedModel, batches: Sequence[Tensor], text: Text) -> Stage:
    """Scores as a run makes them by default: two criteria and the search for outliers in one pass, of all blocks."""
    layers = (0, model.config.num_hidden_layers)
    config = PruningConfig(limits={"attention_layers": layers, "mlp_layers": layers})
    blocks = select_blocks(model, config)
    cost = cost_scores(read_shape(model.config, 4), text, blocks, config.criterion, finds_outliers=True)
    peak = peaks.peak_watched_gates(read_sizes(model.config), 4, text)
    run = lambda: score_blocks(model, CalibrationSet(batches), config, StageCache())  # noqa: E731
    return Stage(f"scores, {config.criterion}, outliers", run, cost, peak)


def _list_damage(model: PreTrainedModel, windows_NT: Tensor, text: Text) -> list[Stage]:
    blocks, batches = find_blocks(model), windows_NT.split(text.batch)
    shape, levels = read_shape(model.config, 4), make_levels(blocks)
    held_out, scores = choose_held_out(len(batches), HOLDOUT), score_units(model, blocks, [], "l2")
    repaired = cost_repaired_damage(shape, text, blocks, levels, HOLDOUT)
    return [
        Stage(
            "curves, repaired",
            lambda: measure_repaired_damage(model, blocks, scores, {}, levels, batches, held_out),
            repaired,
            peaks.peak_curves(read_sizes(model.config), 4, text, HOLDOUT),
        ),
        Stage(
            "curves, gated",
            lambda: measure_damage_curves(model, blocks, scores, levels, batches),
            cost_gated_damage(shape, text, levels),
        ),
    ]


def _list_repair(model: PreTrainedModel, windows_NT: Tensor, text: Text) -> list[Stage]:
    blocks, batches = find_blocks(model), windows_NT.split(text.batch)
    shape, (plan, kept) = read_shape(model.config, 4), make_cut(model)
    held_out = choose_held_out(len(batches), HOLDOUT)
    # One ridge to choose from: how many of several are tried depends on the data.
    fitted = RepairConfig(products="float32", ridges=(0.1,), epochs=0, distill_tokens=text.tokens)
    refined = RepairConfig(products="float32", ridges=(0.1,), epochs=2, distill_tokens=text.tokens)

    def cut(config: RepairConfig, measures_damage: bool) -> None:
        own = copy.deepcopy(model)
        meter = LayerDamageMeter(own, choose_judged(batches, held_out)) if measures_damage else None
        apply_plan_with_repair(own, plan, batches, config, damage=meter)
        if meter is not None:
            meter.measure()

    def learn() -> None:
        pruned, predictions = copy.deepcopy(model), predict()
        apply_plan(pruned, plan)
        distill(pruned, predictions, fitted, 0)

    def predict() -> Any:
        return record_predictions(model, *split_windows(batches, held_out, fitted.distill_tokens), StageCache())

    def cost(config: RepairConfig, measures_damage: bool) -> Cost:
        return cost_cut(shape, text, blocks, kept, config, measures_damage, ridges=1)

    predicted = cost_predictions(shape, text, fitted)
    sizes = read_sizes(model.config)
    long, widest = peaks.list_long_peaks(sizes, 4, text, text), sizes.channel_range[1] - sizes.channel_range[1] // 4
    repair = peaks.peak_repair(sizes, 4, text, HOLDOUT, widest)
    return [
        Stage("cut, least squares", lambda: cut(fitted, False), cost(fitted, False), copies=True),
        Stage("cut, refinement", lambda: cut(refined, False), cost(refined, False), repair, True),
        Stage("cut, refinement, damage of layers", lambda: cut(refined, True), cost(refined, True), copies=True),
        Stage("predictions", predict, predicted),
        Stage(
            "predictions, distillation",
            learn,
            predicted + cost_distillation(shape.cut(kept, blocks), text, fitted),
            long["repair, distillation"],
            True,
        ),
    ]


def _list_training(model: PreTrainedModel, windows_NT: Tensor, text: Text) -> list[Stage]:
    shape, config = read_shape(model.config, 4), RecoveryConfig()
    batch = {"input_ids": windows_NT[: text.batch], "labels": windows_NT[: text.batch]}

    def step(mode: str) -> None:
        student = copy.deepcopy(model).train().requires_grad_(True)
        settings = RecoveryConfig(mode=mode)
        if settings.uses_lora:
            add_adapters(student, settings)
        objective = Objective(settings)
        objective.teacher = model.eval().requires_grad_(False) if settings.distills else None
        objective.learns_all = True
        optimizer = torch.optim.AdamW([own for own in student.parameters() if own.requires_grad])
        for _ in range(STEPS):  # as Lightning does them: gradients are there until the next ones come
            loss, _ = objective.measure(student, batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    stages, sizes = [], read_sizes(model.config)
    long = peaks.list_long_peaks(sizes, 4, text, text.take(text.batch))
    for mode in ("full", "lora", "distill", "lora+distill"):
        cost = cost_recovery_step(shape, text.take(text.batch), mode, config.lora_rank, teacher=shape)
        peak, run = long.get(f"recovery, {mode}"), lambda m=mode: step(m)
        # The model itself is the teacher, and is there beside its copy.
        stages.append(Stage(f"recovery step, {mode}", run, STEPS * cost, peak, copies="distill" not in mode))
    documents = Text(4, 32, 4)
    starts = [[1]] * documents.windows
    cost, peak = cost_sampling(shape, documents), peaks.peak_sampling(sizes, 4, documents)
    stages.append(Stage("sampling", lambda: _write(model, documents, starts), cost, peak))
    return stages


def _write(model: PreTrainedModel, documents: Text, starts: Sequence[Sequence[int]]) -> None:
    """Have the model write documents, without a tokenizer."""
    batch = _Batch(starts, documents.window, 1.0, 1.0, "0")
    _write_batches(model, [batch], None)
