"""Units that carry massive activations: found where they are, and removed last."""

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune import PruningConfig, prune
from gqaprune.common.stage_cache import StageCache
from gqaprune.data.calibration import CalibrationSet
from gqaprune.models.architecture import find_blocks, get_layers
from gqaprune.plan import BlockKey
from gqaprune.planning.selection import score_blocks
from gqaprune.reporting.report import Report
from gqaprune.scoring import outliers
from gqaprune.scoring.outliers import OUTLIER_RATIO, find_outliers, protect_units

from flops import count_tokens
from tiny import make_model, make_plain, make_tokens

BATCHES = [make_tokens(2, 16), make_tokens(1, 16, seed=1)]
MLP = BlockKey(1, "mlp")
CARRIER = 5


def make_massive(channel: int = CARRIER, factor: float = 1000.0) -> PreTrainedModel:
    """A tiny Llama, one channel of whose second MLP writes values so much larger."""
    model = make_model("llama")
    with torch.no_grad():
        get_layers(model)[1].mlp.up_proj.weight[channel] *= factor
    return model


@torch.no_grad()
def measure_largest(model: PreTrainedModel, batches: list[Tensor]) -> Tensor:
    """Largest absolute input of the second MLP's output projection times the norm of its column, channel by channel."""
    seen = []
    down = get_layers(model)[1].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    for batch in batches:
        model(batch)
    handle.remove()
    return torch.cat(seen).abs().amax(0) * down.weight.norm(dim=0)


def test_the_unit_that_writes_massive_values_is_found_with_its_ratio() -> None:
    model = make_massive()
    found = find_outliers(model, find_blocks(model), BATCHES)
    largest = measure_largest(model, BATCHES)
    assert list(found) == [MLP] and list(found[MLP]) == [CARRIER]
    assert found[MLP][CARRIER] == pytest.approx(float(largest[CARRIER] / largest.median()), rel=1e-5)


def test_a_model_without_massive_activations_has_no_outliers_and_is_left_as_it_was() -> None:
    model = make_model("llama").train()
    assert find_outliers(model, find_blocks(model), BATCHES) == {}
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("granularity", ["group", "query"])
def test_units_of_attention_are_outliers_too(granularity: str) -> None:
    model = make_model("llama")
    blocks = find_blocks(model, granularity)
    block = next(block for block in blocks if block.key == BlockKey(0, "attention"))
    with torch.no_grad():
        block.output.weight[:, : block.columns_per_unit] *= 10 * OUTLIER_RATIO
    assert list(find_outliers(model, blocks, BATCHES)[block.key]) == [0]


def test_protected_units_go_last_and_the_others_keep_their_order() -> None:
    scores = {MLP: torch.tensor([3.0, 1.0, 2.0]), BlockKey(0, "mlp"): torch.tensor([5.0, 4.0])}
    protected = protect_units(scores, {MLP: {1: 50.0}})
    assert protected[MLP].argsort().tolist() == [2, 0, 1]
    assert float(protected[MLP][1]) > sum(float(score.sum()) for score in scores.values())
    assert protected[BlockKey(0, "mlp")].equal(scores[BlockKey(0, "mlp")]) and scores[MLP].tolist() == [3.0, 1.0, 2.0]


@pytest.mark.parametrize("most", [8192, 33])
@pytest.mark.parametrize(
    ("criterion", "passes", "own_passes"), [("fisher+obs", 1, 0), ("wanda", 1, 0), ("param_first", 1, 1), ("l1", 0, 1)]
)
def test_outliers_are_found_in_a_pass_that_a_criterion_makes(
    criterion: str, passes: int, own_passes: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outliers, "LOOKED_AT", most)
    model, batches = make_massive(), [*BATCHES, make_tokens(2, 16, seed=2)]
    expected = find_outliers(model, find_blocks(model), batches)
    with count_tokens(model) as counts:
        config = make_plain(criterion=criterion, allocation="optimal", damage="repaired", limits={"mlp_layers": (0, 3)})
        _, found = score_blocks(model, CalibrationSet(batches), config, StageCache())
    assert {key: dict(units) for key, units in found.items()} == {
        key: pytest.approx(dict(units), rel=1e-5) for key, units in expected.items()
    }
    assert counts == [80 * passes + (48 if most == 33 else 80) * own_passes] * 3


@pytest.mark.parametrize("protects", [True, False])
def test_pruning_keeps_the_carrier_whatever_its_score_and_says_so(protects: bool) -> None:
    kept = set()
    for seed in range(8):  # of random scores: some take it
        config = PruningConfig(
            rate=0.15,
            criterion="random",
            allocation="uniform",
            limits={"mlp_layers": (0, 3)},
            repair={"epochs": 0},
            scoring={"protect_outliers": protects},
        )
        plan, report = prune(make_massive(), CalibrationSet(BATCHES, seed=seed), config)
        kept.add(CARRIER in plan.layers[1].channels)
        assert [(outlier.key, outlier.unit) for outlier in report.outliers] == ([(MLP, CARRIER)] if protects else [])
        assert Report.from_dict(report.to_dict()) == report
    assert kept == ({True} if protects else {True, False})
    if protects:
        assert report.describe_outliers().startswith(f"outliers, removed last: layer 1 mlp unit {CARRIER} (")


def test_without_text_nothing_is_looked_at() -> None:
    config = make_plain(rate=0.3, criterion="l1", split="0:10", limits={"mlp_layers": (0, 3)})
    assert prune(make_massive(), [], config)[1].outliers == []
