"""Damage: the KL divergence of a model whose weakest units are cut, by hand, from the dense one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from gqaprune.models.architecture import Block, find_blocks, read_geometry
from gqaprune.plan import BlockKey, KeptUnits, PruningPlan
from gqaprune.planning.allocation import AllocationOptions, BlockBudget, Budget, allocate_optimal
from gqaprune.planning.selection import make_plan
from gqaprune.scoring.damage import measure_damage, measure_damage_curves
from gqaprune.scoring.sensitivity import SENSITIVITIES
from gqaprune.surgery.cut import apply_plan

from tiny import VARIANTS, make_model, make_plain, make_tokens

BATCHES = [make_tokens(2, 16), make_tokens(1, 16, seed=1)]
every = pytest.mark.parametrize("variant", VARIANTS)


def make_scores(blocks: list[Block], levels: int = 1000) -> dict[BlockKey, Tensor]:
    """Random scores, with ties where levels are few."""
    torch.manual_seed(1)
    return {block.key: torch.randint(levels, (block.units,)).double() for block in blocks}


@torch.no_grad()
def measure_cut(variant: str, scores: dict[BlockKey, Tensor], removed: dict[BlockKey, int]) -> float:
    """KL(dense ‖ cut) with the units of lowest score cut away by surgery."""
    dense, cut = make_model(variant), make_model(variant)
    kept = {}
    for key, score in scores.items():
        order = sorted(range(len(score)), key=lambda unit: (-float(score[unit]), unit))
        kept[key] = tuple(sorted(order[: len(score) - removed.get(key, 0)]))
    layers = tuple(KeptUnits(kept[BlockKey(i, "attention")], kept[BlockKey(i, "mlp")]) for i in range(3))
    apply_plan(cut, PruningPlan(read_geometry(dense.config), layers))
    total, tokens = 0.0, 0
    for batch in BATCHES:
        p, q = (functional.softmax(model(input_ids=batch).logits.double(), -1) for model in (dense, cut))
        total += float((p * (p / q).log()).sum())
        tokens += batch.numel()
    return total / tokens


@every
def test_curve_is_the_divergence_of_the_model_cut_in_one_block(variant: str) -> None:
    model = make_model(variant, kv_heads=2)
    blocks = find_blocks(model)
    scores = make_scores(blocks)
    levels = {block.key: [0, 1] if block.key.kind == "attention" else [0, 4, 11] for block in blocks}
    curves = measure_damage_curves(model, blocks, scores, levels, BATCHES)
    for key, curve in curves.items():
        assert [count for count, _ in curve] == levels[key]
        for count, damage in curve:
            assert damage == pytest.approx(measure_cut(variant, scores, {key: count}), rel=1e-3, abs=1e-6)
        assert curve[-1][1] > 0


@every
def test_damage_is_the_divergence_of_the_model_cut_everywhere(variant: str) -> None:
    model = make_model(variant)
    blocks = find_blocks(model)
    scores = make_scores(blocks, levels=3)  # ties: the plan keeps the lower index
    removed = {block.key: 1 if block.key.kind == "attention" else 7 for block in blocks}
    found = measure_damage(model, blocks, scores, removed, BATCHES)
    assert found == pytest.approx(measure_cut(variant, scores, removed), rel=1e-3)
    assert measure_damage(model, blocks, scores, {}, BATCHES) == 0


def test_damage_of_query_heads_is_the_divergence_of_the_model_without_the_weakest_of_every_group() -> None:
    dense, cut = make_model(kv_heads=2, ratio=3), make_model(kv_heads=2, ratio=3)
    blocks = find_blocks(dense, "query")
    scores = make_scores(blocks, levels=3)
    removed = {block.key: 1 if block.key.kind == "attention" else 4 for block in blocks}
    apply_plan(cut, make_plan(cut, blocks, scores, removed, make_plain(granularity="query")))
    assert read_geometry(cut.config).query_heads == (4, 4, 4) and read_geometry(cut.config).kv_heads == (2, 2, 2)
    with torch.no_grad():
        p, q = (functional.softmax(model(input_ids=BATCHES[0]).logits.double(), -1) for model in (dense, cut))
    by_hand = float((p * (p / q).log()).sum()) / BATCHES[0].numel()
    assert measure_damage(dense, blocks, scores, removed, BATCHES[:1]) == pytest.approx(by_hand, rel=1e-3)


def test_divergence_that_is_not_finite_is_refused_with_its_place() -> None:
    model = make_model()
    blocks = find_blocks(model)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="layer 0 mlp without 3 units on calibration batch 0 is not finite"):
        measure_damage_curves(model, blocks[1:2], make_scores(blocks), {blocks[1].key: [3]}, BATCHES)


def test_optimal_on_measured_curves_takes_from_the_block_that_costs_least() -> None:
    model = make_model()
    blocks = [block for block in find_blocks(model) if block.key.kind == "mlp"]
    scores = make_scores(blocks)
    with torch.no_grad():
        blocks[1].output.weight.mul_(1e-3)  # this MLP hardly matters, whatever its scores say
    curves = measure_damage_curves(model, blocks, scores, {block.key: [5, 10, 19] for block in blocks}, BATCHES)
    budgets = [BlockBudget(b.key, scores[b.key].sort().values.tolist(), b.unit_parameters) for b in blocks]
    layer = 20 * blocks[0].unit_parameters
    removed = allocate_optimal(budgets, Budget(0.3, 3 * layer, [layer] * 3), AllocationOptions(curves=curves))
    assert removed[blocks[1].key] >= 17


def measure_everything(rank: int, world_size: int, folder: Path) -> None:
    """Every sensitivity and damage, written by each rank."""
    if world_size > 1:
        address = f"file://{folder / f'rendezvous-{world_size}'}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    model: PreTrainedModel = make_model("qwen2")
    blocks = find_blocks(model)
    scores = make_scores(blocks)
    batches = [make_tokens(2, seed=seed) for seed in range(3)]  # no even share
    result = {name: list(measure(model, blocks, batches).values()) for name, measure in SENSITIVITIES.items()}
    result["damage"] = [measure_damage(model, blocks, scores, {block.key: 1 for block in blocks}, batches)]
    curves = measure_damage_curves(model, blocks, scores, {block.key: [1] for block in blocks}, batches)
    result["curves"] = [damage for curve in curves.values() for _, damage in curve]
    torch.save(result, folder / f"{world_size}-{rank}.pt")


def test_sensitivity_and_damage_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    measure_everything(0, 1, tmp_path)
    torch.multiprocessing.spawn(measure_everything, (2, tmp_path), nprocs=2)
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert first == second
    for name, values in one.items():
        assert first[name] == pytest.approx(values, rel=1e-9)
