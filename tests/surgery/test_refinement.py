"""Refinement: every MLP comes nearer to its target on held-out tokens or stays to the bit, alike on every rank."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_repair import BATCHES, measure_divergence, plan_cut, plan_one
from torch import Tensor, nn

from gqaprune.common.stage_cache import StageCache
from gqaprune.surgery.cut import apply_plan
from gqaprune.surgery.refinement import TokenPairs, count_free_bytes, refine_mlp, reserve_pairs
from gqaprune.surgery.repair import apply_plan_with_repair
from gqaprune.surgery.repair_config import RepairConfig

from cuts import make_plan, make_repair
from tiny import make_model, make_tokens

OPTIONS = RepairConfig(epochs=40, learning_rate=0.03)


def make_mlp(seed: int = 0) -> nn.Module:
    mlp = copy.deepcopy(make_model().model.layers[seed].mlp)
    return mlp.requires_grad_(False)


def make_pairs(target: nn.Module, tokens: int, seed: int) -> TokenPairs:
    x_ND = torch.randn(tokens, target.gate_proj.in_features, generator=torch.Generator().manual_seed(seed))
    return TokenPairs(x_ND, target(x_ND).float())


def move(mlp: nn.Module, size: float = 0.05) -> nn.Module:
    """The same module with other weights: no output projection alone makes up for that."""
    generator = torch.Generator().manual_seed(7)
    for parameter in mlp.parameters():
        parameter += size * torch.randn(parameter.shape, generator=generator)
    return mlp


def measure(mlp: nn.Module, pairs: TokenPairs) -> float:
    return float((mlp(pairs.x_ND).float() - pairs.y_ND).square().sum() / pairs.y_ND.square().sum())


def copy_weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_held_out_tokens_come_nearer_and_every_matrix_moves() -> None:
    target, mlp = make_mlp(), move(make_mlp())
    fit, held = make_pairs(target, 2000, 1), make_pairs(target, 500, 2)
    before, weights = measure(mlp, held), copy_weights(mlp)
    refinement = refine_mlp(mlp, fit, held, OPTIONS, seed=0)
    assert refinement.is_kept and measure(mlp, held) < 0.3 * before
    assert refinement.error_after < 0.3 * refinement.error_before
    assert refinement.error_before == pytest.approx(before, rel=0.2)  # massive tokens weigh less
    assert all(not torch.equal(tensor, weights[name]) for name, tensor in mlp.state_dict().items())
    assert not any(parameter.requires_grad for parameter in mlp.parameters())


@pytest.mark.parametrize("rate", [0.02, 1.0], ids=["nothing to gain", "far too fast"])
def test_what_does_not_come_nearer_stays_to_the_bit(rate: float) -> None:
    target = make_mlp()
    mlp = make_mlp() if rate < 1 else move(make_mlp(), 1e-4)
    weights = copy_weights(mlp)
    fit, held = make_pairs(target, 1000, 1), make_pairs(target, 200, 2)
    refinement = refine_mlp(mlp, fit, held, RepairConfig(epochs=3, learning_rate=rate), seed=0)
    assert not refinement.is_kept and refinement.error_after == refinement.error_before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in mlp.state_dict().items())


def test_training_that_went_too_far_is_taken_back_part_of_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens with noise in their targets: the end of training fits the noise, part of the way does not yet."""
    target = make_mlp()
    fit, held = make_pairs(target, 60, 1), make_pairs(target, 500, 2)
    fit.y_ND.add_(0.3 * fit.y_ND.std() * torch.randn(fit.y_ND.shape, generator=torch.Generator().manual_seed(3)))
    options, errors = RepairConfig(epochs=20, learning_rate=0.01), {}
    for shares in ((1.0,), (0.25, 0.5, 0.75, 1.0)):
        mlp = move(make_mlp(), 0.02)
        start = measure(mlp, held)
        monkeypatch.setattr("gqaprune.surgery.refinement.SHARES", shares)
        refinement = refine_mlp(mlp, fit, held, options, seed=0)
        errors[shares[0]] = measure(mlp, held)
    assert refinement.is_kept and errors[0.25] < 0.95 * min(start, errors[1.0])
    assert refinement.error_after == pytest.approx(errors[0.25], rel=0.2)  # massive tokens weigh less


def test_massive_tokens_do_not_drown_the_others() -> None:
    target, mlp = make_mlp(), move(make_mlp())
    fit, held = make_pairs(target, 2000, 1), make_pairs(target, 500, 2)
    fit.y_ND[::100] = 1e4  # out of the MLP's reach
    before = measure(mlp, held)
    refine_mlp(mlp, fit, held, OPTIONS, seed=0)
    assert measure(mlp, held) < 0.7 * before


def test_relative_errors_count_alike_where_a_norm_follows() -> None:
    """Half of the tokens want a tenth of what the MLP gives: hardly any of the squared error, half of the relative."""
    target, errors = make_mlp(), {}
    fit, held = make_pairs(target, 2000, 1), make_pairs(target, 500, 2)
    for pairs in (fit, held):
        pairs.y_ND[::2] *= 0.1
    for is_normed in (False, True):
        mlp = move(make_mlp())
        refinement = refine_mlp(mlp, fit, held, RepairConfig(epochs=100, learning_rate=0.05), 0, is_normed)
        error_N = (mlp(held.x_ND) - held.y_ND).square().sum(1) / held.y_ND.square().sum(1)
        errors[is_normed] = float(error_N.mean())
    assert errors[True] < 0.5 * errors[False], errors
    assert refinement.error_after == pytest.approx(errors[True], rel=1e-3)


def test_without_held_out_tokens_those_of_the_fit_are_judged() -> None:
    target, mlp = make_mlp(), move(make_mlp())
    fit = make_pairs(target, 1000, 1)
    refinement = refine_mlp(mlp, fit, TokenPairs(fit.x_ND[:0], fit.y_ND[:0]), OPTIONS, seed=0)
    assert refinement.is_kept and refinement.error_before > 0


def test_bfloat16_stays_and_is_judged_as_stored() -> None:
    target, mlp = make_mlp(), move(make_mlp()).to(torch.bfloat16)
    fit, held = make_pairs(target, 2000, 1), make_pairs(target, 500, 2)
    fit, held = (TokenPairs(pairs.x_ND.to(torch.bfloat16), pairs.y_ND) for pairs in (fit, held))
    before = measure(mlp, held)
    assert refine_mlp(mlp, fit, held, OPTIONS, seed=0).is_kept
    assert all(parameter.dtype == torch.bfloat16 for parameter in mlp.parameters())
    assert measure(mlp, held) < 0.5 * before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tokens_lie_on_the_mlps_device_if_training_has_room_beside_them(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp, wide = make_mlp().to("meta", dtype), 2 if dtype == torch.bfloat16 else 4
    width, weights = mlp.gate_proj.in_features, sum(parameter.numel() for parameter in mlp.parameters())
    needed = 1200 * width * (dtype.itemsize + wide) + 18 * weights
    for free, place in ((needed + 1, "meta"), (needed, "cpu")):
        monkeypatch.setattr("gqaprune.surgery.refinement.count_free_bytes", lambda _, free=free: free)
        for pairs, count in zip(reserve_pairs((1000, 200), width, mlp), (1000, 200), strict=True):
            assert pairs.x_ND.shape == pairs.y_ND.shape == (count, width)
            assert pairs.x_ND.device.type == pairs.y_ND.device.type == place
            assert (pairs.x_ND.dtype, pairs.y_ND.dtype.itemsize) == (dtype, wide)


@pytest.mark.parametrize(("free", "fraction", "left"), [(60, 1.0, 65), (3, 1.0, 8), (60, 0.3, 9)])
def test_free_memory_of_a_gpu_is_what_the_card_and_the_cap_leave_and_what_torch_holds_unused(
    free: int, fraction: float, left: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"mem_get_info": (free, 80), "get_per_process_memory_fraction": fraction}
    for name, value in (facts | {"memory_reserved": 20, "memory_allocated": 15}).items():
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    assert count_free_bytes(torch.device("cuda")) == left
    assert count_free_bytes(torch.device("cpu")) > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_tokens_on_the_host_give_what_those_on_the_gpu_give() -> None:
    weights = []
    for place in ("cuda", "cpu"):
        fit, held = make_pairs(make_mlp(), 2000, 1), make_pairs(make_mlp(), 500, 2)
        mlp = move(make_mlp()).to("cuda")
        fit, held = (TokenPairs(pairs.x_ND.to(place), pairs.y_ND.to(place)) for pairs in (fit, held))
        assert refine_mlp(mlp, fit, held, OPTIONS, seed=0).is_kept
        weights.append(mlp.down_proj.weight)
    torch.testing.assert_close(*weights)


def test_products_in_bfloat16_give_nearly_the_same_weights_as_in_float32() -> None:
    target = make_mlp()
    fit = make_pairs(target, 2000, 1)
    weights = {}
    for products in ("float32", "bfloat16"):
        mlp = move(make_mlp())
        refine_mlp(mlp, fit, fit, replace(OPTIONS, products=products), seed=0)
        weights[products] = mlp.up_proj.weight.detach()
    difference = (weights["bfloat16"] - weights["float32"]).norm() / weights["float32"].norm()
    assert 1e-5 < difference < 1e-2


@pytest.mark.parametrize("zeros", [["up_proj.bias", "down_proj.bias"], ["down_proj.weight"], ["gate_proj.bias"]])
@pytest.mark.parametrize("size", [0.0, 1e-9])
def test_parameters_that_begin_at_zero_are_trained_like_others(zeros: list[str], size: float) -> None:
    target = copy.deepcopy(make_model("llama-biases").model.layers[0].mlp).requires_grad_(False)
    mlp = copy.deepcopy(target)
    for name in zeros:
        mlp.get_parameter(name).fill_(size)
    fit, held = make_pairs(target, 2000, 1), make_pairs(target, 500, 2)
    refinement = refine_mlp(mlp, fit, held, OPTIONS, seed=0)
    assert refinement.error_after < 0.7 * refinement.error_before
    for name in zeros:
        assert mlp.get_parameter(name).abs().mean() > 0.1 * target.get_parameter(name).abs().mean()


def test_targets_of_zeros_change_nothing() -> None:
    mlp = make_mlp()
    weights = copy_weights(mlp)
    x_ND = torch.randn(100, mlp.gate_proj.in_features)
    pairs = TokenPairs(x_ND, torch.zeros_like(x_ND))
    assert refine_mlp(mlp, pairs, pairs, OPTIONS, seed=0).error_before == 0
    assert all(torch.equal(tensor, weights[name]) for name, tensor in mlp.state_dict().items())


@pytest.mark.parametrize("variant", ["llama-biases", "qwen2"])
def test_refined_models_are_nearer_to_the_dense_one_than_refitted_ones(variant: str) -> None:
    dense, refitted, refined = (make_model(variant) for _ in range(3))
    plan = make_plan(dense, [[0, 1]] * 3, [list(range(0, 20, 2))] * 3)
    apply_plan_with_repair(refitted, plan, BATCHES, make_repair(pull=0.5, everywhere=True))
    options = make_repair(pull=0.5, everywhere=True, epochs=40, learning_rate=0.03)
    repairs = apply_plan_with_repair(refined, plan, BATCHES, options)
    kinds = {repair.key.kind: repair.refinement is not None for repair in repairs}
    assert kinds == {"attention": False, "mlp": True}
    assert measure_divergence(refined, dense) < 0.9 * measure_divergence(refitted, dense)


@pytest.mark.parametrize("refines", [True, False], ids=["refined", "refitted alone"])
def test_windows_that_refinement_is_judged_on_take_no_part_in_the_fit_before_it(refines: bool) -> None:
    """Where it follows: otherwise the refitted weights would look best there, whatever training makes of them."""
    batches = [*BATCHES[:9], make_tokens(4, 30, seed=99)]  # the last one is held out
    refinement = {"epochs": int(refines), "learning_rate": 1e-9}  # which leaves the weights where they are
    weights_DC = []
    for own in (BATCHES, batches):
        model = make_model()
        options = make_repair(ridges=(0.1,), **refinement)
        (repair,) = apply_plan_with_repair(model, plan_one(model, (1, "mlp")), own, options)
        assert repair.ridge == 0.1
        weights_DC.append(model.model.layers[1].mlp.down_proj.weight)
    assert torch.allclose(*weights_DC, rtol=0, atol=1e-7) == refines
    cut = make_model()
    apply_plan(cut, plan_one(cut, (1, "mlp")))
    assert not torch.allclose(cut.model.layers[1].mlp.down_proj.weight, weights_DC[0], rtol=0, atol=1e-3)


def test_layers_after_refined_mlps_get_what_these_give(variant: str, tmp_path: Path) -> None:
    """The last block alone, after blocks that are there already, whose layers run as a whole: the same bits."""
    dtype = torch.float32 if variant == "qwen2_moe" else torch.bfloat16  # experts that small do not run in bfloat16
    whole, resumed = (make_model(variant).to(dtype) for _ in range(2))
    plan, stages = plan_cut(whole), StageCache(tmp_path)
    options = make_repair(pull=0.5, everywhere=True, epochs=2)
    repairs = apply_plan_with_repair(whole, plan, BATCHES, options, stages)
    assert {repair.key for repair in repairs if repair.refinement} >= {(0, "mlp"), (1, "mlp")}
    (tmp_path / f"repair-of-layer-2-{repairs[-1].key.kind}.stage").unlink()
    assert apply_plan_with_repair(resumed, plan, BATCHES, options, stages) == repairs
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), resumed.parameters(), strict=True))


def refine_and_save(rank: int, world_size: int, folder: Path) -> None:
    """Weights and errors, written by each rank; the second of two has fewer tokens."""
    if world_size > 1:
        address = f"file://{folder / 'rendezvous'}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    model = make_model()
    options = make_repair(pull=0.5, epochs=40, learning_rate=0.03)
    repairs = apply_plan_with_repair(model, plan_cut(model), BATCHES[:3], options)
    errors = [(r.refinement.error_before, r.refinement.error_after) for r in repairs if r.refinement]
    torch.save(model.state_dict() | {"errors": torch.tensor(errors)}, folder / f"{world_size}-{rank}.pt")


def test_two_processes_end_with_the_same_weights_as_good_as_those_of_one(tmp_path: Path) -> None:
    refine_and_save(0, 1, tmp_path)
    torch.multiprocessing.spawn(refine_and_save, (2, tmp_path), nprocs=2)
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    assert all(torch.equal(first[name], second[name]) for name in one)
    torch.testing.assert_close(first["errors"], one["errors"], rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"epochs": -1}, "epochs must be at least 0, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be in \\(0, 1\\], .*got 0.0; try 0.02"),
        ({"learning_rate": 1.5}, "learning_rate must be in \\(0, 1\\], .*got 1.5"),
    ],
)
def test_options_out_of_bounds_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RepairConfig(**options)
