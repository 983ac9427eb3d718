"""Damage after repair is the divergence of a model with one block cut and refitted, and allocations follow it."""

import copy
from functools import partial

import pytest
import torch
from torch import Tensor

from gqaprune import PruningConfig, prune
from gqaprune.models.architecture import find_blocks
from gqaprune.models.gates import apply_gates
from gqaprune.models.layerwise import watch_inputs
from gqaprune.placement.model_hash import hash_model
from gqaprune.plan import BlockKey
from gqaprune.scoring.damage import make_gates
from gqaprune.scoring.repaired_damage import (
    Cut,
    RepairedDamage,
    choose_judged,
    choose_levels,
    draw_curves,
    measure_repaired_damage,
    predict_damage,
)
from gqaprune.scoring.scores import Scores
from gqaprune.surgery.gram import Gram, Memory
from gqaprune.surgery.removal import remove_weakest

from flops import count_tokens
from tiny import make_model, make_tokens

BATCHES = [make_tokens(2, seed=seed) for seed in range(6)]
HELD_OUT = {2, 5}
JUDGED = BATCHES[2]


def measure(model: torch.nn.Module, granularity: str = "group", **options: bool) -> tuple[RepairedDamage, Scores]:
    blocks = find_blocks(model, granularity)  # type: ignore[arg-type]
    scores = {block.key: torch.rand(block.units, dtype=torch.float64) for block in blocks}
    levels = {
        block.key: choose_levels(block.key.kind, block.units // block.groups, block.units // block.groups - 1)
        for block in blocks
    }
    return measure_repaired_damage(model, blocks, scores, {}, levels, BATCHES, HELD_OUT, **options), scores  # type: ignore[arg-type]


def diverge(dense: Tensor, other: Tensor) -> float:
    dense, other = dense.double().log_softmax(-1), other.double().log_softmax(-1)
    return float((dense.exp() * (dense - other)).sum(-1).mean())


@pytest.mark.parametrize(("variant", "granularity"), [("llama", "group"), ("gemma3", "group"), ("llama", "query")])
def test_without_refit_it_is_the_divergence_of_the_model_with_these_units_gated(variant: str, granularity: str) -> None:
    torch.manual_seed(0)
    model = make_model(variant, kv_heads=4 if granularity == "group" else 2)
    before = hash_model(model)
    damage, scores = measure(model, granularity, refits=False)
    assert hash_model(model) == before
    blocks = find_blocks(model, granularity)
    with torch.no_grad():
        dense = model(JUDGED).logits
        for cut, value in damage.points.items():
            gates = make_gates(blocks, scores | damage.scores, {cut.key: cut.removed}, model.device)
            with apply_gates(blocks, gates):
                assert value == pytest.approx(diverge(dense, model(JUDGED).logits), rel=1e-3, abs=1e-6), str(cut)


@pytest.mark.parametrize(("windows", "expected"), [(8, [1]), (64, [1] * 4), (224, [1] * 4)])
def test_judged_text_is_a_sixteenth_of_the_calibration_text_and_at_most_2048_tokens(
    windows: int, expected: list[int]
) -> None:
    batches = list(torch.arange(windows * 512).view(windows, 512).split(4))
    held_out = {1, len(batches) - 1}
    pieces = choose_judged(batches, held_out)
    assert [len(piece) for piece in pieces] == expected
    assert torch.equal(torch.cat(pieces), torch.cat([batches[index] for index in sorted(held_out)])[: len(pieces)])


def test_short_windows_are_judged_several_at_a_time() -> None:
    pieces = choose_judged(list(torch.zeros(256, 64).split(16)), {0, 1})
    assert [len(piece) for piece in pieces] == [8, 8]


def test_layers_are_run_once_for_each_text_each_cut_and_each_cut_before() -> None:
    model = make_model("llama", kv_heads=4)
    with count_tokens(model) as counts:
        damage, _ = measure(model)
    cuts = [sum(cut.key.layer == layer for cut in damage.points) for layer in range(3)]
    fitted = sum(batch.numel() for index, batch in enumerate(BATCHES) if index not in HELD_OUT)
    assert cuts == [3, 3, 3]
    assert counts == [fitted + JUDGED.numel() * (1 + sum(cuts[: layer + 1])) for layer in range(3)]


def test_with_refit_it_is_that_of_the_model_with_the_refitted_weights() -> None:
    torch.manual_seed(0)
    model = make_model("llama", channels=32)
    damage, scores = measure(model)
    block = find_blocks(model)[3]
    order_C = scores[block.key].argsort(descending=True)
    fit = Gram(32, Memory(model.device))
    with torch.no_grad():
        for index in set(range(6)) - HELD_OUT:
            with watch_inputs({"": block.output}, lambda _, x_NC: fit.add(x_NC[:, order_C])):
                model(BATCHES[index])
        changed = copy.deepcopy(model)
        (loss_DC,) = remove_weakest(block, fit, order_C, [16], refits=True)
        find_blocks(changed)[3].output.weight -= loss_DC
        refitted = diverge(model(JUDGED).logits, changed(JUDGED).logits)
    assert damage.points[Cut(block.key, 16)] == pytest.approx(refitted, rel=1e-3)


def test_units_of_attention_go_in_the_order_in_which_they_were_chosen() -> None:
    model = make_model("llama", kv_heads=4)
    with torch.no_grad():  # of layer 1, what group 2 adds is nothing
        model.model.layers[1].self_attn.o_proj.weight[:, 2 * 24 : 3 * 24] = 0
    damage, _ = measure(model)
    score_U = damage.scores[BlockKey(1, "attention")]
    assert int(score_U.argmin()) == 2 and sorted(score_U.tolist()) == [1, 2, 3, 4]
    assert damage.points[Cut(BlockKey(1, "attention"), 1)] < 1e-6


def test_activations_that_overflow_are_named() -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight *= 1e38
    with pytest.raises(ValueError, match="layer 1 mlp: the input of its output projection is not finite"):
        measure(model)


def test_curves_are_powers_through_what_was_measured() -> None:
    predict = partial(predict_damage, "attention")
    assert predict([(2, 0.1), (4, 0.4)], 4) == pytest.approx(0.4)
    assert predict([(2, 0.1), (4, 0.4)], 2) == pytest.approx(0.1)
    assert predict([(2, 0.1), (4, 0.4)], 8) == pytest.approx(1.6)
    assert predict([(1, 0.3)], 0) == predict([], 3) == 0
    assert predict([(2, 0.4), (4, 0.2)], 2) == pytest.approx(0.1)  # noise: more cannot cost less
    assert predict([(1, 0.3)], 2) == pytest.approx(1.2)
    assert predict_damage("mlp", [(8, 0.4)], 4) == pytest.approx(0.4 / 2**1.25)
    first, second, attention = BlockKey(0, "mlp"), BlockKey(1, "mlp"), BlockKey(0, "attention")
    points = {first: [(8, 0.2)], second: [(8, 0.8)], attention: [(1, 0.3)]}
    curves = draw_curves(points, {first: 15, second: 15, attention: 1})
    assert curves[second][8] / curves[first][8] == pytest.approx(2)  # of four times as much on a logarithmic scale
    assert curves[first][8] / curves[first][4] == pytest.approx(4) and curves[attention] == [0.0, pytest.approx(0.3)]


@pytest.mark.parametrize(
    ("units", "most", "levels"),
    [(3, 2, [1, 2]), (2, 1, [1]), (1, 0, []), (8, 7, [2, 4]), (8, 3, [2, 3])],
)
def test_attention_is_measured_at_a_quarter_and_a_half_mlps_at_a_half(units: int, most: int, levels: list[int]) -> None:
    assert choose_levels("attention", units, most) == levels
    assert choose_levels("mlp", units, most) == levels[-1:]


def test_optimal_takes_the_group_that_costs_nothing_first_and_says_what_each_layer_did() -> None:
    model = make_model("llama", kv_heads=4, channels=48)
    with torch.no_grad():
        model.model.layers[2].self_attn.o_proj.weight[:, :24] *= 1e-3
    dense = copy.deepcopy(model)
    plan, report = prune(model, BATCHES, PruningConfig(0.15, allocation="optimal", repair={"epochs": 0}))
    assert 0 not in plan.layers[2].groups and plan.pruned_geometry.channels != plan.geometry.channels
    damages = {damage.layer: damage for damage in report.damages}
    changed = copy.deepcopy(dense)  # the dense model with layer 2 alone as it is now
    changed.model.layers[2] = model.model.layers[2]
    judged = BATCHES[5]  # the one that repair holds out
    with torch.no_grad():
        value = diverge(dense(judged).logits, changed(judged).logits)
    assert damages[2].measured == pytest.approx(value, rel=1e-3)


def test_several_steps_measure_what_is_left() -> None:
    config = PruningConfig(0.3, allocation="optimal", steps=2, repair={"epochs": 0})
    model = make_model("llama", kv_heads=4, channels=48)
    before = sum(parameter.numel() for parameter in model.model.layers.parameters())
    plan, report = prune(model, BATCHES, config)
    after = sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert 1 - after / before == pytest.approx(0.3, abs=0.02)
    assert plan.rate == 0.3 and report.damages
