"""Repair: least squares against torch.linalg.lstsq, never worse on held-out windows, saved and loaded, on any ranks."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

import gqaprune.surgery.block_refit
from gqaprune.checkpoints.save import save
from gqaprune.models.architecture import Block, find_blocks, read_geometry
from gqaprune.models.loading import load_model
from gqaprune.plan import BlockKey, PruningPlan
from gqaprune.surgery import gram
from gqaprune.surgery.cut import apply_plan, list_kept_columns
from gqaprune.surgery.repair import BlockRepair, apply_plan_with_repair, choose_held_out, share_batches
from gqaprune.surgery.repair_config import RepairConfig

from cuts import make_plan, make_repair
from tiny import VARIANTS, make_model, make_tokens

BATCHES = [make_tokens(4, 30, seed=seed) for seed in range(10)]
GROUPS, CHANNELS = [0, 1], list(range(20))
HALF = list(range(0, 20, 2))


def plan_cut(model: PreTrainedModel) -> PruningPlan:
    """Every layer otherwise: attention and MLP, MLP alone, attention alone."""
    return make_plan(model, [[0], GROUPS, [1]], [HALF, HALF, CHANNELS])


def plan_one(model: PreTrainedModel, key: tuple[int, str]) -> PruningPlan:
    """One block loses half."""
    layers, (layer, kind) = range(3), key
    groups = [[1] if (i, kind) == (layer, "attention") else GROUPS for i in layers]
    return make_plan(model, groups, [HALF if (i, kind) == (layer, "mlp") else CHANNELS for i in layers])


def get_block(model: PreTrainedModel, key: tuple[int, str]) -> Block:
    return next(block for block in find_blocks(model) if block.key == key)


@torch.no_grad()
def capture(model: PreTrainedModel, key: tuple[int, str], batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Input and output of a block's output projection on all tokens, float64."""
    calls: list[tuple[Tensor, Tensor]] = []
    output = get_block(model, key).output
    handle = output.register_forward_hook(lambda _, x, y: calls.append((x[0].flatten(0, 1), y.flatten(0, 1))))
    for batch in batches:
        model(batch)
    handle.remove()
    return torch.cat([x for x, _ in calls]).double(), torch.cat([y for _, y in calls]).double()


@torch.no_grad()
def capture_hidden(model: PreTrainedModel, layer: int, batches: list[Tensor]) -> Tensor:
    """Hidden states after a layer on all tokens, before any norm, float64."""
    states: list[Tensor] = []
    handle = model.model.layers[layer].register_forward_hook(lambda _, __, hidden: states.append(hidden.flatten(0, 1)))
    for batch in batches:
        model(batch)
    handle.remove()
    return torch.cat(states).double()


@torch.no_grad()
def measure_divergence(model: PreTrainedModel, dense: PreTrainedModel) -> float:
    """KL from the dense model on the calibration text, nats per token."""
    pairs = [(model(batch).logits.log_softmax(-1), dense(batch).logits.log_softmax(-1)) for batch in BATCHES]
    mine, theirs = (torch.cat(logits).flatten(0, 1) for logits in zip(*pairs, strict=True))
    return float(functional.kl_div(mine, theirs, log_target=True, reduction="batchmean"))


def tie_channels(model: PreTrainedModel) -> None:
    """Each odd channel does what the even one before it does."""
    with torch.no_grad():
        for layer in model.model.layers:
            for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
                linear.weight[1::2] = linear.weight[::2]


@pytest.mark.parametrize("key", [(1, "attention"), (1, "mlp")], ids=str)
@pytest.mark.parametrize("ridge", [1e-8, 0.3])
@pytest.mark.parametrize(
    ("variant", "bias"),
    [("llama", False), ("llama", True), ("llama-biases", False), ("llama-biases", True), ("gemma2", False)],
)
def test_weights_solve_least_squares(variant: str, bias: bool, ridge: float, key: tuple[int, str]) -> None:
    model = make_model(variant)
    plan = plan_one(model, key)
    x_NC, y_ND = capture(model, key, BATCHES)
    block = get_block(model, key)
    kept = list_kept_columns(plan, block)
    weight_DK = block.output.weight.detach().double()[:, kept]
    old_bias_D = None if block.output.bias is None else block.output.bias.detach().clone()
    (repair,) = apply_plan_with_repair(model, plan, BATCHES, make_repair(ridges=(ridge,), bias=bias))
    assert repair.key == key and repair.ridge == ridge

    # Where a norm comes next, each token's relative error counts alike.
    size_N1 = y_ND.norm(dim=1, keepdim=True) if variant == "gemma2" else torch.ones(len(y_ND), 1)
    if not bias and old_bias_D is not None:
        y_ND = y_ND - old_bias_D.double()
    x_NC, y_ND = x_NC / size_N1, y_ND / size_N1
    # The ridge is a penalty on moving a weight: as many more tokens, one for each column, without the constant.
    x_NK = x_NC[:, kept]
    penalty = (ridge * x_NK.square().sum(0).mean()).sqrt()
    ones = torch.cat([torch.ones(len(x_NK), 1), torch.zeros(len(kept), 1)]).double()
    x_NK = torch.cat([x_NK, penalty * torch.eye(len(kept))])
    y_ND = torch.cat([y_ND, penalty * weight_DK.T])
    solution = torch.linalg.lstsq(torch.cat([x_NK, ones], dim=1) if bias else x_NK, y_ND).solution
    torch.testing.assert_close(block.output.weight.T.double(), solution[: len(kept)], atol=2e-4, rtol=1e-3)
    if bias:
        torch.testing.assert_close(block.output.bias.double(), solution[-1], atol=2e-4, rtol=1e-3)
    elif old_bias_D is not None:
        assert torch.equal(block.output.bias, old_bias_D)


def test_strong_ridge_leaves_the_weights_as_cut() -> None:
    repaired, cut = make_model("llama-biases"), make_model("llama-biases")
    apply_plan_with_repair(repaired, plan_cut(repaired), BATCHES, make_repair(ridges=(1e9,)))
    apply_plan(cut, plan_cut(cut))
    for one, other in zip(repaired.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("count", "settings", "is_said"), [(1, {}, True), (2, {}, False), (1, {"method": "bias"}, False)]
)
def test_a_single_batch_that_leaves_none_to_choose_on_is_said(
    count: int, settings: dict[str, Any], is_said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model("llama-biases")
    with caplog.at_level("INFO", logger="gqaprune"):
        apply_plan_with_repair(model, plan_cut(model), BATCHES[:count], make_repair(**settings))
    assert ("nothing can be held out of a single calibration batch" in caplog.text) is is_said


@pytest.mark.parametrize("batches", [BATCHES, BATCHES[:2]], ids=["much text", "little text"])
def test_errors_are_those_on_held_out_windows_and_repair_is_no_worse(batches: list[Tensor]) -> None:
    key = (1, "mlp")
    model = make_model("qwen2")
    plan = plan_one(model, key)
    held_out = [batches[index] for index in choose_held_out(len(batches), RepairConfig().holdout)]
    x_NC, y_ND = capture(model, key, held_out)
    block = get_block(model, key)
    x_NK = x_NC[:, list_kept_columns(plan, block)]
    cut_DK = block.output.weight.detach().double()[:, HALF]

    @torch.no_grad()
    def measure(weight_DK: Tensor) -> float:
        return float((x_NK @ weight_DK.double().T - y_ND).square().sum() / y_ND.square().sum())

    (repair,) = apply_plan_with_repair(model, plan, batches, make_repair())
    assert repair.error_before == pytest.approx(measure(cut_DK), rel=1e-4)
    assert repair.error_after <= repair.error_before
    assert measure(block.output.weight) <= repair.error_before * (1 + 1e-6)


def test_fit_that_loses_on_held_out_windows_leaves_the_cut_weights_to_the_bit() -> None:
    repaired, cut = make_model("llama"), make_model("llama")
    plan = plan_one(cut, (2, "mlp"))
    few = [make_tokens(1, 9), make_tokens(4, 30, seed=1)]  # fewer tokens than channels, fitted to the letter
    (repair,) = apply_plan_with_repair(repaired, plan, few, make_repair(ridges=(1e-6,), holdout=0.5))
    assert repair.ridge is None and repair.error_after == repair.error_before > 0
    apply_plan(cut, plan)
    assert all(torch.equal(one, other) for one, other in zip(repaired.parameters(), cut.parameters(), strict=True))


def test_ridge_is_the_one_that_is_best_on_held_out_windows() -> None:
    little = [make_tokens(1, 30, seed=seed) for seed in range(2)]

    def repair(*ridges: float) -> BlockRepair:
        model = make_model()
        (repair,) = apply_plan_with_repair(model, plan_one(model, (1, "mlp")), little, make_repair(ridges=ridges))
        return repair

    each = {ridge: repair(ridge) for ridge in (1e-6, 0.1, 1.0, 1e3)}
    best = min(each.values(), key=lambda one: one.error_after)
    assert repair(*each) == best and best.ridge not in (None, 1e-6, 1e3)


@pytest.mark.parametrize(
    ("batches", "share", "held_out"),
    [(1, 0.2, set()), (2, 0.2, {1}), (10, 0.2, {4, 9}), (3, 0.99, {0, 2}), (7, 0.3, {2, 6})],
)
def test_held_out_batches_are_spread_and_leave_one(batches: int, share: float, held_out: set[int]) -> None:
    assert choose_held_out(batches, share) == held_out


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_ranks_share_out_both_batches_to_fit_on_and_held_out_ones(ranks: int) -> None:
    held_out = choose_held_out(56, 1 / 8)  # every eighth
    shares = [share_batches(56, held_out, rank, ranks) for rank in range(ranks)]
    assert sorted(index for share in shares for index in share) == list(range(56))
    assert all(share == sorted(share) for share in shares)
    for counts in (
        [len(share) for share in shares],
        [len(held_out.intersection(share)) for share in shares],
        [len(set(share) - held_out) for share in shares],
    ):
        assert max(counts) - min(counts) <= 1


def test_ridge_too_weak_for_a_solution_is_passed_over() -> None:
    model = make_model()
    few = [make_tokens(1, 3, seed=seed) for seed in range(4)]
    (repair,) = apply_plan_with_repair(model, plan_one(model, (1, "attention")), few, make_repair(ridges=(1e-300, 1e3)))
    assert repair.ridge == 1e3


@pytest.mark.parametrize("variant", ["llama-biases", "gemma2"])
def test_repair_does_not_depend_on_the_panels(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    models, repairs = [], []
    for workspace in (2**29, 4096):
        monkeypatch.setattr(gram, "WORKSPACE", workspace)
        models.append(make_model(variant))
        options = make_repair(pull=0.5, bias=variant == "llama-biases")
        repairs.append(apply_plan_with_repair(models[-1], plan_cut(models[-1]), BATCHES, options))
    for one, other in zip(*repairs, strict=True):
        assert (one.key, one.ridge) == (other.key, other.ridge) and one.ridge is not None
        assert one.error_after == pytest.approx(other.error_after, rel=1e-5)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_where_all_windows_have_no_fit_that_of_the_judged_ridge_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    real, key = gqaprune.surgery.block_refit.refit, (1, "mlp")
    monkeypatch.setattr(
        gqaprune.surgery.block_refit,
        "refit",
        lambda start_DS, parts, *rest: float("inf") if len(parts) > 1 else real(start_DS, parts, *rest),
    )
    model = make_model()
    plan = plan_one(model, key)
    x_NC, y_ND = capture(model, key, [BATCHES[index] for index in choose_held_out(len(BATCHES), 0.1)])
    (repair,) = apply_plan_with_repair(model, plan, BATCHES, make_repair())
    lost_ND = x_NC[:, HALF] @ get_block(model, key).output.weight.detach().double().T - y_ND
    assert repair.error_after < repair.error_before
    assert repair.error_after == pytest.approx(float(lost_ND.square().sum() / y_ND.square().sum()), rel=1e-4)


def test_one_batch_is_enough() -> None:
    model = make_model()
    repairs = apply_plan_with_repair(model, plan_cut(model), BATCHES[:1], make_repair())
    assert [repair.key for repair in repairs] == [(0, "attention"), (0, "mlp"), (1, "mlp"), (2, "attention")]
    assert all(repair.error_after < repair.error_before for repair in repairs)


@pytest.mark.parametrize("options", [{}, {"pull": 0.5}, {"pull": 1.0, "everywhere": True}], ids=str)
def test_repair_brings_every_family_nearer_to_the_dense_model(variant: str, options: dict[str, Any]) -> None:
    dense, cut, repaired = (make_model(variant) for _ in range(3))
    apply_plan(cut, plan_cut(cut))
    apply_plan_with_repair(repaired, plan_cut(dense), BATCHES, make_repair(**options))
    assert read_geometry(repaired.config) == plan_cut(dense).pruned_geometry
    assert measure_divergence(repaired, dense) < 0.9 * measure_divergence(cut, dense)


def test_channels_that_others_can_stand_in_for_cost_nothing() -> None:
    dense, cut, repaired = (make_model() for _ in range(3))
    for model in (dense, cut, repaired):
        tie_channels(model)
    plan = make_plan(dense, [GROUPS] * 3, [HALF] * 3)
    apply_plan(cut, plan)
    repairs = apply_plan_with_repair(repaired, plan, BATCHES, make_repair(ridges=(1e-6,)))
    assert all(repair.error_after < 1e-6 < 0.1 < repair.error_before for repair in repairs)
    assert measure_divergence(repaired, dense) < 1e-5 < 1e-2 < measure_divergence(cut, dense)


def test_pull_brings_the_last_hidden_states_nearer_and_everywhere_nearer_still() -> None:
    dense = make_model()
    plan = make_plan(dense, [[0], GROUPS, [1]], [HALF, CHANNELS, HALF])
    distances = []
    for options in ({}, {"pull": 1.0}, {"pull": 1.0, "everywhere": True}):
        model = make_model()
        settings = make_repair(ridges=(0.001, 0.01, 0.1), holdout=0.2, **options)
        repairs = apply_plan_with_repair(model, plan, BATCHES, settings)
        distances.append(float((capture_hidden(model, 2, BATCHES) - capture_hidden(dense, 2, BATCHES)).norm()))
    assert distances[0] > 1.02 * distances[1] and distances[1] > 1.02 * distances[2], distances
    assert len(repairs) == 6


@pytest.mark.parametrize("kind", ["attention", "mlp"])
@pytest.mark.parametrize("variant", ["llama", "granite"])
def test_full_pull_fits_to_the_dense_hidden_states(variant: str, kind: str) -> None:
    dense, model = make_model(variant), make_model(variant)
    multiplier = 0.6 if variant == "granite" else 1.0
    last = ([1], CHANNELS) if kind == "attention" else (GROUPS, HALF)
    plan = make_plan(dense, [[0], GROUPS, last[0]], [CHANNELS, CHANNELS, last[1]])
    apply_plan_with_repair(model, plan, BATCHES, make_repair(ridges=(1e-8,), pull=1.0))
    x_NK, _ = capture(model, (2, kind), BATCHES)
    dense_ND, pruned_ND = (
        capture_hidden(m, 2, BATCHES)
        if kind == "mlp"
        else capture_hidden(m, 1, BATCHES) + multiplier * capture(m, (2, "attention"), BATCHES)[1]
        for m in (dense, model)
    )
    # What least squares leaves is at right angles to what it was given.
    left_ND = dense_ND - pruned_ND
    angles = (x_NK.T @ left_ND).abs() / (x_NK.norm(dim=0)[:, None] * left_ND.norm(dim=0))
    assert left_ND.norm() > 1 and angles.max() < 1e-3


def test_pull_does_nothing_where_a_norm_follows() -> None:
    """What a block gives is no longer what hidden states gain."""
    weights = []
    for options in ({}, {"pull": 1.0, "everywhere": True}):
        model = make_model("gemma2")
        repairs = apply_plan_with_repair(model, plan_cut(model), BATCHES[:4], make_repair(**options))
        weights.append(model.state_dict())
    assert len(repairs) == 4
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kept", [1, 2])
def test_query_heads_are_repaired(kept: int, attention: str) -> None:
    dense, cut, repaired = (make_model("qwen3") for _ in range(3))
    repaired.set_attn_implementation(attention)
    first = sorted(group * 3 + (head + group) % 3 for group in GROUPS for head in range(kept))
    queries = [first, None, [3 + head for head in range(kept)]]
    plan = make_plan(dense, [GROUPS, GROUPS, [1]], [CHANNELS, HALF, CHANNELS], queries)
    apply_plan(cut, plan)
    repairs = apply_plan_with_repair(repaired, plan, BATCHES, make_repair(pull=0.5))
    assert len(repairs) == 3
    assert measure_divergence(repaired, dense) < 0.9 * measure_divergence(cut, dense)


PLACES = [(variant, False) for variant in VARIANTS] + [("llama", True), ("llama-biases", True)]


@pytest.mark.parametrize("uniform", [True, False])
@pytest.mark.parametrize(("variant", "bias"), PLACES)
def test_repaired_models_load_with_the_same_logits(variant: str, bias: bool, uniform: bool, tmp_path: Path) -> None:
    model = make_model(variant, kv_heads=4)
    groups, channels = ([[0, 2]] * 3, [HALF] * 3) if uniform else ([[0], [0, 1], [3]], [HALF, CHANNELS, [0, 1]])
    plan = make_plan(model, groups, channels)
    apply_plan_with_repair(model, plan, BATCHES[:4], make_repair(bias=bias, pull=0.5))
    assert save(model, None, tmp_path / "out", plan) == ("stock" if uniform else "per-layer")
    loaded = load_model(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(loaded(BATCHES[0]).logits, model(BATCHES[0]).logits)


def test_channel_that_is_constant_costs_nothing_with_a_bias() -> None:
    dense, cut, repaired = (make_model("llama-biases") for _ in range(3))
    for model in (dense, cut, repaired):
        with torch.no_grad():
            for linear in (model.model.layers[1].mlp.gate_proj, model.model.layers[1].mlp.up_proj):
                linear.weight[4], linear.bias[4] = 0, 3
    plan = make_plan(dense, [GROUPS] * 3, [CHANNELS, [c for c in CHANNELS if c != 4], CHANNELS])
    apply_plan(cut, plan)
    weight = cut.model.layers[1].mlp.down_proj.weight
    (repair,) = apply_plan_with_repair(repaired, plan, BATCHES, make_repair(method="bias"))
    assert repair.ridge == 0 and repair.error_after < 1e-6 < 0.01 < repair.error_before
    assert torch.equal(repaired.model.layers[1].mlp.down_proj.weight, weight)
    assert measure_divergence(repaired, dense) < 1e-7 < 1e-3 < measure_divergence(cut, dense)


def test_bias_alone_is_the_mean_of_what_went_and_the_other_new_biases_are_zeros() -> None:
    key = BlockKey(1, "mlp")
    model = make_model("llama")
    x_NC, _ = capture(model, key, BATCHES)
    removed = [c for c in CHANNELS if c not in HALF]
    mean_D = x_NC.mean(0)[removed] @ get_block(model, key).output.weight.detach().double()[:, removed].T
    (repair,) = apply_plan_with_repair(model, plan_one(model, key), BATCHES, make_repair(method="bias"))
    assert repair.error_after < repair.error_before
    torch.testing.assert_close(get_block(model, key).output.bias.double(), mean_D, atol=1e-5, rtol=0)
    assert (model.config.mlp_bias, model.config.attention_bias) == (True, False)
    biases = {name: p for name, p in model.named_parameters() if name.endswith("bias")}
    assert len(biases) == 9 and [name for name, p in biases.items() if p.any()] == ["model.layers.1.mlp.down_proj.bias"]


def test_bias_without_a_place_is_refused_and_the_model_untouched() -> None:
    options = make_repair(bias=True)
    for variant in ("mistral", "qwen2", "qwen3"):
        model = make_model(variant)
        before = model.state_dict()
        with pytest.raises(
            ValueError, match=rf"{variant} checkpoints cannot store .* llama \(attention and mlp\), .*qwen3"
        ):
            apply_plan_with_repair(model, plan_cut(model), BATCHES, options)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model = make_model("qwen3")
    assert apply_plan_with_repair(model, plan_one(model, (1, "attention")), BATCHES, options)
    assert model.model.layers[1].self_attn.o_proj.bias.any() and model.config.attention_bias


def test_bfloat16_models_are_repaired() -> None:
    dense, cut, repaired = (make_model("qwen2").to(torch.bfloat16) for _ in range(3))
    apply_plan(cut, plan_cut(cut))
    repairs = apply_plan_with_repair(repaired, plan_cut(repaired), BATCHES, make_repair(pull=0.5))
    assert all(parameter.dtype == torch.bfloat16 for parameter in repaired.parameters())
    assert all(repair.error_after < repair.error_before for repair in repairs)
    assert measure_divergence(repaired, dense) < 0.9 * measure_divergence(cut, dense)


@pytest.mark.parametrize("options", [{}, {"pull": 1.0, "everywhere": True}], ids=str)
def test_plan_that_removes_nothing_changes_no_bit(variant: str, options: dict[str, Any]) -> None:
    model = make_model(variant)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_json_string()
    plan = make_plan(model, [GROUPS] * 3, [CHANNELS] * 3)
    assert apply_plan_with_repair(model, plan, BATCHES, make_repair(**options)) == []
    assert model.config.to_json_string() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_flags_and_mode_are_as_before() -> None:
    model = make_model().train()
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(False)
    apply_plan_with_repair(model, plan_cut(model), BATCHES, make_repair(bias=True))
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert model.training and frozen == [f"model.layers.0.mlp.down_proj.{part}" for part in ("weight", "bias")]


def test_activations_that_overflow_are_named_with_their_block() -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5] = 3e38
    with pytest.raises(ValueError, match="layer 1 mlp: .*not finite on the calibration text.*bfloat16"):
        apply_plan_with_repair(model, plan_cut(model), BATCHES)


def test_no_batches_and_foreign_plans_are_refused() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="at least one calibration batch"):
        apply_plan_with_repair(model, plan_cut(model), [])
    with pytest.raises(ValueError, match="another model"):
        apply_plan_with_repair(model, plan_cut(make_model(kv_heads=3)), BATCHES)
    assert read_geometry(model.config) == read_geometry(make_model().config)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ridges": ()}, "ridges must be"),
        ({"ridges": (0.1, 0.0)}, "ridges must be"),
        ({"holdout": 0.0}, "holdout must be"),
        ({"pull": 1.5}, "pull must be"),
        ({"method": "magic"}, "method must be one of least_squares, bias, none, got 'magic'"),
    ],
)
def test_settings_out_of_bounds_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        RepairConfig(**options)


def repair_and_save(rank: int, world_size: int, folder: Path) -> None:
    """Weights and errors, written by each rank; moments are in panels."""
    if world_size > 1:
        address = f"file://{folder / 'rendezvous'}"
        torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)
    model = make_model("llama")
    with patch.object(gram, "WORKSPACE", 4096):
        repairs = apply_plan_with_repair(model, plan_cut(model), BATCHES[:5], make_repair(pull=0.5, bias=True))
    errors = torch.tensor([(repair.ridge, repair.error_before, repair.error_after) for repair in repairs])
    torch.save(model.state_dict() | {"errors": errors}, folder / f"{world_size}-{rank}.pt")


def test_two_processes_repair_as_one(tmp_path: Path) -> None:
    repair_and_save(0, 1, tmp_path)
    torch.multiprocessing.spawn(repair_and_save, (2, tmp_path), nprocs=2)
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1-0", "2-0", "2-1"))
    for name, value in one.items():
        assert torch.equal(first[name], second[name])
        assert torch.equal(first[name], value)


def test_an_earlier_cut_does_not_hinder() -> None:
    model = make_model("llama", kv_heads=3)
    first = make_plan(model, [[0, 1], [0, 1, 2], [1, 2]], [HALF, CHANNELS, CHANNELS])
    apply_plan_with_repair(model, first, BATCHES, make_repair(bias=True))
    again = make_plan(model, [[0], [1], [0]], [[0, 1, 2], HALF, HALF])
    repairs = apply_plan_with_repair(model, again, BATCHES, make_repair(bias=True))
    assert len(repairs) == 6 and all(repair.error_after <= repair.error_before for repair in repairs)
