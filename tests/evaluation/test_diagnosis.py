"""Diagnosis: models broken on purpose, each in its own way, are told apart."""

import copy
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedModel

from gqaprune.data.windows import make_batches
from gqaprune.evaluation.diagnosis import Diagnosis, build_diagnosis_table, diagnose, find_not_finite
from gqaprune.models.architecture import find_blocks, get_layers
from gqaprune.plan import KeptUnits, PruningPlan
from gqaprune.planning.selection import keep_everything
from gqaprune.scoring.scores import score_units
from gqaprune.surgery.cut import apply_plan

from tiny import make_model, make_pattern, train_model

WINDOWS = make_pattern(8)
BATCHES = make_batches(WINDOWS, WINDOWS, 4)
LAYERS = 8


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    """A model of eight layers that has learned the pattern."""
    torch.manual_seed(0)
    return train_model(make_model(layers=LAYERS), WINDOWS).eval()


def plan_channels(model: PreTrainedModel, removed: dict[int, list[int]]) -> PruningPlan:
    """Some channels gone from some layers."""
    whole = keep_everything(model)
    layers = [
        replace(kept, channels=tuple(c for c in kept.channels if c not in removed.get(layer, ())))
        for layer, kept in enumerate(whole.layers)
    ]
    return replace(whole, layers=tuple(layers), rate=0.3)


def rank_channels(model: PreTrainedModel) -> dict[int, list[int]]:
    """Channels of every layer, the least important first."""
    scores = score_units(model, find_blocks(model), list(WINDOWS.split(4)), "fisher")
    return {key.layer: score_U.argsort().tolist() for key, score_U in scores.items() if key.kind == "mlp"}


def judge(
    dense: PreTrainedModel, plan: PruningPlan, pruned: PreTrainedModel | None = None, **more: object
) -> Diagnosis:
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    if pruned is None:
        pruned = copy.deepcopy(dense)
        apply_plan(pruned, plan)
    diagnosis = diagnose(dense, pruned, plan, BATCHES, **more)  # type: ignore[arg-type]
    assert all(tensor.equal(before[name]) for name, tensor in dense.state_dict().items())
    return diagnosis


def test_the_wrong_units_are_blamed_where_others_would_have_cost_less(dense: PreTrainedModel) -> None:
    ranked = rank_channels(dense)
    diagnosis = judge(dense, plan_channels(dense, {layer: own[-4:] for layer, own in ranked.items()}))
    assert diagnosis.verdict is not None and diagnosis.verdict.cause == "choice"
    assert "criterion" in diagnosis.describe() and diagnosis.cut == pytest.approx(diagnosis.pruned, rel=1e-4)
    right = copy.deepcopy(dense)
    apply_plan(right, plan_channels(dense, {layer: own[:4] for layer, own in ranked.items()}))
    assert diagnosis.verdict.perplexity == pytest.approx(judge_perplexity(right), rel=1e-4)


def judge_perplexity(model: PreTrainedModel) -> float:
    with torch.no_grad():
        return float(model(WINDOWS, labels=WINDOWS).loss.exp())


def test_outliers_are_blamed_before_the_choice(dense: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gqaprune.scoring.outliers.OUTLIER_RATIO", 1.5)  # a tiny model has none that stand out by 20
    ranked = rank_channels(dense)
    diagnosis = judge(dense, plan_channels(dense, {layer: own[-4:] for layer, own in ranked.items()}))
    assert diagnosis.verdict is not None and diagnosis.verdict.cause == "outliers"
    assert "protect_outliers" in diagnosis.describe()


def test_layers_that_give_too_much_are_named(dense: PreTrainedModel) -> None:
    worst = {}
    for layer, own in rank_channels(dense).items():
        worst[layer] = judge(dense, plan_channels(dense, {layer: own[:-1]})).pruned
    bad = max(worst, key=lambda layer: worst[layer])
    ranked = rank_channels(dense)
    removed = {layer: own[:1] for layer, own in ranked.items()} | {bad: ranked[bad][:-1]}
    diagnosis = judge(dense, plan_channels(dense, removed))
    assert diagnosis.verdict is not None and diagnosis.verdict.cause == "layers"
    assert diagnosis.verdict.sentence.startswith(f"layer {bad} ") and "mlp_layers" in diagnosis.describe()
    assert min(diagnosis.layers, key=lambda layer: diagnosis.layers[layer]) == bad


def test_attention_that_gives_too_much_is_blamed(dense: PreTrainedModel) -> None:
    whole = keep_everything(dense)
    ranked = rank_channels(dense)
    scores = score_units(dense, find_blocks(dense), list(WINDOWS.split(4)), "fisher")
    weakest = {key.layer: int(score_U.argmin()) for key, score_U in scores.items() if key.kind == "attention"}
    layers = tuple(KeptUnits((1 - weakest[layer],), tuple(sorted(ranked[layer][1:]))) for layer in range(LAYERS))
    diagnosis = judge(dense, replace(whole, layers=layers, rate=0.3))
    assert diagnosis.verdict is not None and diagnosis.verdict.cause == "attention"
    assert "one of 2 KV heads is 50%" in diagnosis.describe() and "pruning.split" in diagnosis.describe()


@pytest.mark.parametrize(("is_trained", "word"), [(False, "pruning.repair"), (True, "learning rate")])
def test_what_came_after_the_cut_is_blamed(dense: PreTrainedModel, is_trained: bool, word: str) -> None:
    plan = plan_channels(dense, {layer: own[:1] for layer, own in rank_channels(dense).items()})
    pruned = copy.deepcopy(dense)
    apply_plan(pruned, plan)
    with torch.no_grad():
        get_layers(pruned)[3].mlp.down_proj.weight.normal_(std=3.0)
    diagnosis = judge(dense, plan, pruned, is_trained=is_trained)
    assert diagnosis.verdict is not None and diagnosis.verdict.cause == "repair" and word in diagnosis.describe()


def test_where_nothing_else_explains_it_the_rate_does(dense: PreTrainedModel) -> None:
    removed = {layer: own[:16] for layer, own in rank_channels(dense).items() if layer > 0}
    diagnosis = judge(dense, plan_channels(dense, removed))
    assert diagnosis.verdict is not None and diagnosis.verdict.cause == "rate"
    assert "rate 30% is too high" in diagnosis.describe() and "lower pruning.rate" in diagnosis.describe()


def test_weights_that_are_not_finite_are_named(dense: PreTrainedModel) -> None:
    pruned = copy.deepcopy(dense)
    with torch.no_grad():
        get_layers(pruned)[2].mlp.up_proj.weight[0, 0] = float("inf")
    diagnosis = judge(dense, plan_channels(dense, {0: [1]}), pruned)
    assert diagnosis.verdict is not None and diagnosis.verdict.cause == "not finite"
    assert "layer 2 (model.layers.2.mlp.up_proj.weight)" in diagnosis.describe()


def test_overflow_in_float16_is_told_with_layer_and_type(dense: PreTrainedModel) -> None:
    model = copy.deepcopy(dense).half()
    with torch.no_grad():
        get_layers(model)[1].mlp.up_proj.weight *= 1000
        get_layers(model)[1].mlp.gate_proj.weight *= 1000
    assert "activations of layer 1 overflow" in str(find_not_finite(model, BATCHES))
    diagnosis = judge(model, plan_channels(model, {0: [1]}), copy.deepcopy(model), made_for=torch.bfloat16)
    assert [finding.cause for finding in diagnosis.findings] == ["dtype", "not finite"]
    assert diagnosis.describe().endswith("set model.dtype to bfloat16 or float32")


def test_the_table_shows_every_finding_and_plain_types_hold_them(dense: PreTrainedModel) -> None:
    diagnosis = judge(dense, plan_channels(dense, {layer: own[-4:] for layer, own in rank_channels(dense).items()}))
    console = Console(width=200)
    with console.capture() as captured:
        console.print(build_diagnosis_table(diagnosis))
    assert all(finding.cause in captured.get() for finding in diagnosis.findings)
    assert diagnosis.to_dict()["verdict"]["cause"] == "choice"
