"""What importance, measured damage, splits and KV budgets do to the plan that pruning makes."""

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from gqaprune import PruningPlan, prune
from gqaprune.data.calibration import CalibrationSet
from gqaprune.models.architecture import count_layer_parameters, count_parameters, find_blocks
from gqaprune.planning.allocation import ALLOCATIONS
from gqaprune.scoring.damage import measure_damage_curves
from gqaprune.scoring.scores import ScoringConfig, score_units
from gqaprune.scoring.sensitivity import SENSITIVITIES

from tiny import make_model, make_plain, make_tokens

BATCHES = [make_tokens(2, seed=seed) for seed in range(3)]


def make_uneven_model() -> PreTrainedModel:
    """Four layers, of which the second does nearly all the work."""
    model = make_model("llama", kv_heads=4, channels=40, layers=4)
    with torch.no_grad():
        for layer in (0, 2, 3):
            model.model.layers[layer].self_attn.o_proj.weight.mul_(1e-2)
            model.model.layers[layer].mlp.down_proj.weight.mul_(1e-2)
    return model


@cache
def sample_text() -> list[Tensor]:
    """Text that the uneven model wrote itself, so that its loss rises where it is hurt."""
    torch.manual_seed(0)
    model, start = make_uneven_model(), torch.randint(0, 256, (16, 1))
    text = model.generate(
        start, attention_mask=torch.ones_like(start), do_sample=True, max_length=32, min_length=32, pad_token_id=257
    )
    return list(text.split(4))


def count_lost(plan: PruningPlan) -> list[int]:
    """What each layer lost in channels, a group being worth about 21 of them here."""
    before, after = plan.geometry, plan.pruned_geometry
    return [
        channels - left + 21 * (kv - kv_left)
        for channels, left, kv, kv_left in zip(
            before.channels, after.channels, before.kv_heads, after.kv_heads, strict=True
        )
    ]


@torch.no_grad()
def measure_divergence(model: PreTrainedModel) -> float:
    """KL of the uneven model from what it was."""
    found = 0.0
    for batch in sample_text():
        p, q = (functional.softmax(m(input_ids=batch).logits.double(), -1) for m in (make_uneven_model(), model))
        found += float((p * (p / q).log()).sum(-1).mean()) / len(sample_text())
    return found


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_kv_rate_removes_that_share_of_kv_heads_and_rate_what_it_says(allocation: str) -> None:
    model = make_model("qwen2", kv_heads=4, channels=40, layers=4)
    before = sum(count_layer_parameters(model))
    config = make_plain(rate=0.3, kv_rate=0.25, allocation=allocation)
    plan, _ = prune(model, BATCHES, config)
    assert sum(plan.pruned_geometry.kv_heads) == 12  # of 16
    channel = find_blocks(model)[1].unit_parameters
    assert abs(before - sum(count_layer_parameters(model)) - 0.3 * before) <= 4 * channel
    assert plan.kv_rate == 0.25


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("allocation", ["uniform", "global", "inverse"])
def test_kv_rate_alone_removes_groups_only(allocation: str, steps: int) -> None:
    model = make_model("llama", kv_heads=4, layers=4)
    config = make_plain(rate=0.0, kv_rate=0.5, allocation=allocation, steps=steps)
    plan, report = prune(model, BATCHES, config)
    assert sum(plan.pruned_geometry.kv_heads) == 8 and plan.pruned_geometry.channels == (20,) * 4
    dense, pruned = report.stages
    assert pruned.kv_cache_bytes_per_token * 2 == dense.kv_cache_bytes_per_token


@pytest.mark.parametrize("allocation", ALLOCATIONS)
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_split_says_within_one_group_what_attention_gives(allocation: str, share: float) -> None:
    model = make_model("llama", kv_heads=4, channels=40, layers=4)
    attention = find_blocks(model)[0]
    target = 0.25 * sum(count_layer_parameters(model))
    split = f"{10 * share:g}:{10 - 10 * share:g}"
    if share == 1.0 and allocation == "uniform":  # one group of every layer, exactly
        target = 4 * attention.unit_parameters
    config = make_plain(rate=target / sum(count_layer_parameters(model)), split=split, allocation=allocation)
    group, plan = attention.unit_parameters, prune(model, BATCHES, config)[0]
    gone = 16 - sum(plan.pruned_geometry.kv_heads)
    step = 4 * group if allocation == "uniform" else group
    assert abs(gone * group - share * target) <= step
    assert share > 0 or gone == 0
    assert share < 1 or plan.pruned_geometry.channels == (40,) * 4


@pytest.mark.parametrize("sensitivity", SENSITIVITIES)
def test_inverse_protects_the_layer_that_matters_and_proportional_takes_from_it(sensitivity: str) -> None:
    lost = {}
    for allocation, alpha in (("inverse", 3.0), ("proportional", 3.0), ("inverse", 0.0)):
        config = make_plain(rate=0.3, allocation=allocation, sensitivity={"alpha": alpha, "method": sensitivity})
        lost[allocation, alpha] = count_lost(prune(make_uneven_model(), sample_text(), config)[0])
    inverse, proportional, alike = lost.values()
    assert inverse[1] < min(inverse[0], inverse[2], inverse[3]) / 2
    assert proportional[1] > max(proportional[0], proportional[2], proportional[3]) * 2
    assert max(alike) - min(alike) <= 21


def test_logarithm_of_importance_lifts_the_layers_between() -> None:
    def lose(log: bool) -> list[int]:
        config = make_plain(
            rate=0.3,
            allocation="inverse",
            limits={"attention_layers": (0, 0)},
            sensitivity={"method": "block_removal", "alpha": 2.0, "log": log},
        )
        model = make_model("llama", channels=200, layers=4)
        with torch.no_grad():
            for layer, factor in enumerate((1.0, 0.3, 0.1, 0.03)):
                model.model.layers[layer].mlp.down_proj.weight.mul_(factor)
        return count_lost(prune(model, BATCHES, config)[0])

    # The most and the least important layer keep their ratio; those between come nearer to the first, and lose less.
    plain, log = lose(False), lose(True)
    assert log[1] / log[3] < 0.95 * plain[1] / plain[3]
    assert sum(log) == pytest.approx(sum(plain), abs=1)


@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_frozen_layers_stay_whole_and_are_those_that_matter(allocation: str) -> None:
    config = make_plain(rate=0.3, criterion="random", allocation=allocation, limits={"frozen_layers": 1})
    frozen, free = (
        count_lost(prune(make_uneven_model(), sample_text(), replace(config, limits={"frozen_layers": count}))[0])
        for count in (1, 0)
    )
    assert [count == 0 for count in frozen] == [False, True, False, False]
    assert 0 not in free


def test_budget_that_frozen_layers_leave_no_room_for_is_refused_before_scoring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gqaprune.planning.selection.score_units", lambda *_: pytest.fail("scored"))
    model = make_uneven_model()
    before = count_parameters(model)
    with pytest.raises(ValueError, match="nearest reachable rate is 0"):
        prune(model, BATCHES, make_plain(rate=0.5, limits={"frozen_layers": 3}, allocation="global"))
    assert count_parameters(model) == before


def test_what_is_reachable_depends_on_the_layers_that_importance_freezes() -> None:
    # Layer 1 matters and gives channels only: once it is frozen, the groups of layer 0 have to do, and they do.
    blocks = find_blocks(make_uneven_model())
    rate = 45 * blocks[1].unit_parameters / sum(count_layer_parameters(make_uneven_model()))
    config = make_plain(
        rate=rate, allocation="global", limits={"frozen_layers": 1, "attention_layers": (0, 1), "mlp_layers": (1, 2)}
    )
    plan, _ = prune(make_uneven_model(), sample_text(), config)
    assert plan.pruned_geometry.kv_heads == (2, 4, 4, 4) and plan.pruned_geometry.channels == (40,) * 4


def test_frozen_layers_make_a_min_rate_reachable_that_all_layers_together_cannot_meet() -> None:
    config = make_plain(
        rate=0.15, limits={"min_rate": 0.17, "frozen_layers": 1, "attention_layers": (0, 0)}, allocation="global"
    )
    lost = count_lost(prune(make_uneven_model(), sample_text(), config)[0])
    assert lost[1] == 0 and min(lost[0], *lost[2:]) > 0
    with pytest.raises(ValueError, match="min_rate 17.00% already takes more"):
        prune(make_uneven_model(), sample_text(), replace(config, limits=replace(config.limits, frozen_layers=0)))


def test_saved_sensitivity_is_used_again_and_fits_other_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "sensitivity.json"
    config = make_plain(rate=0.3, allocation="inverse", sensitivity={"path": str(path)})
    plan, _ = prune(
        make_uneven_model(),
        CalibrationSet(sample_text(), source="tiny", seed=7),
        replace(config, limits={"mlp_layers": (0, 3)}),
    )
    assert len(json.loads(path.read_text())["importance"]) == 8  # all blocks
    fresh, _ = prune(
        make_uneven_model(),
        CalibrationSet(sample_text(), source="tiny", seed=7),
        replace(config, sensitivity={"path": None}),
    )
    monkeypatch.setitem(SENSITIVITIES, "removal", lambda *_: pytest.fail("measured again"))  # type: ignore[arg-type]
    again, _ = prune(
        make_uneven_model(),
        CalibrationSet(sample_text(), source="tiny", seed=7),
        replace(config, limits={"mlp_layers": (0, 3)}),
    )
    other, _ = prune(make_uneven_model(), CalibrationSet(sample_text(), source="tiny", seed=7), config)
    assert again == plan and other == fresh != plan
    with pytest.raises(ValueError, match="saved sensitivity is of another run.*seed 7 against 8"):
        prune(make_uneven_model(), CalibrationSet(sample_text(), source="tiny", seed=8), config)


def test_importance_is_measured_only_where_it_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(SENSITIVITIES, "removal", lambda *_: pytest.fail("measured"))  # type: ignore[arg-type]
    for allocation in ("uniform", "global", "optimal"):
        prune(
            make_uneven_model(),
            sample_text(),
            make_plain(allocation=allocation, sensitivity={"path": str(tmp_path / "s")}),
        )
    assert not (tmp_path / "s").exists()


def test_optimal_on_measured_damage_sees_what_magnitude_does_not() -> None:
    def lose(**settings: Any) -> list[int]:
        model = make_model("llama", channels=40)
        with torch.no_grad():
            model.model.layers[1].mlp.gate_proj.weight.mul_(10)  # large weights …
            model.model.layers[1].mlp.down_proj.weight.mul_(1e-4)  # … that come to nothing
        config = make_plain(
            rate=0.15,
            criterion="l1",
            allocation="optimal",
            limits={"attention_layers": (0, 0), "min_channels": 4},
            **settings,
        )
        return count_lost(prune(model, BATCHES, config)[0])

    assert lose()[1] == 0
    assert lose(damage="gated", damage_levels=4)[1] >= 30


@pytest.mark.parametrize("levels", [2, 3, 5, 50])
def test_damage_is_measured_at_so_many_removals_of_which_none_is_zero(
    levels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def measure(model: Any, blocks: Any, scores: Any, removals: Any, batches: Any) -> Any:
        asked.append(removals)
        return measure_damage_curves(model, blocks, scores, removals, batches)

    monkeypatch.setattr("gqaprune.planning.counts.measure_damage_curves", measure)
    prune(
        make_model("llama"), BATCHES, make_plain(rate=0.2, allocation="optimal", damage="gated", damage_levels=levels)
    )
    for key, removals in asked[0].items():
        most = 19 if key.kind == "mlp" else 1
        assert len(removals) == min(levels, most) and removals[-1] == most
        steps = [after - before for before, after in pairwise([0, *removals])]
        assert min(steps) >= 1 and max(steps) - min(steps) <= 1


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_swaps_find_less_divergence_within_the_same_budget(allocation: str) -> None:
    # Random scores: the allocation knows nothing of the layers, the measured divergence does.
    config = make_plain(rate=0.3, criterion="random", allocation=allocation)
    found, parameters = [], []
    for generations in (0, 6):
        model = make_uneven_model()
        prune(model, sample_text(), replace(config, swaps={"generations": generations, "offspring": 6}))
        found.append(measure_divergence(model))
        parameters.append(sum(count_layer_parameters(model)))
    assert found[1] < 0.9 * found[0]
    step = max(block.unit_parameters for block in find_blocks(make_uneven_model()))
    assert parameters[1] == pytest.approx(parameters[0], abs=4 * step)


def test_swaps_keep_a_kv_budget_and_frozen_layers() -> None:
    config = make_plain(
        rate=0.25, kv_rate=0.25, limits={"frozen_layers": 1}, swaps={"generations": 3}, allocation="global"
    )
    plan, _ = prune(make_uneven_model(), sample_text(), config)
    assert sum(plan.pruned_geometry.kv_heads) == 12
    assert count_lost(plan)[1] == 0


@pytest.mark.parametrize(
    "settings", [{"allocation": "optimal", "damage": "gated", "damage_levels": 3}, {"swaps": {"generations": 2}}]
)
def test_damage_is_measured_of_query_heads_too(settings: dict[str, Any]) -> None:
    model = make_model("llama", kv_heads=2, ratio=4, channels=40)
    before = sum(count_layer_parameters(model))
    config = make_plain(rate=0.15, granularity="query", limits={"mlp_layers": (0, 0)}, **settings)
    plan, _ = prune(model, BATCHES, config)
    assert plan.pruned_geometry.kv_heads == (2, 2, 2) and min(plan.pruned_geometry.ratios) < 4
    heads = find_blocks(make_model("llama", kv_heads=2, ratio=4, channels=40), "query")[0]
    assert 0.15 * before - (before - sum(count_layer_parameters(model))) < 2 * heads.unit_parameters


def test_normalized_blocks_compare_by_shares() -> None:
    def lose(normalization: str) -> list[int]:
        model = make_model("llama", channels=40)
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight.mul_(0.02)  # the block with the least scores
        config = make_plain(
            rate=0.15,
            allocation="global",
            scoring={"normalization": normalization},
            limits={"attention_layers": (0, 0), "min_channels": 4},
        )
        return count_lost(prune(model, BATCHES, config)[0])

    assert lose("none")[0] > 30 > 20 > lose("mean")[0] > 0


@pytest.mark.parametrize(
    ("settings", "scoring", "seed"),
    [
        ({"criterion": "l2", "scoring": {"reduction": "max"}}, ScoringConfig(reduction="max"), 0),
        ({"criterion": "obs", "scoring": {"obs_ridge": 100.0}}, ScoringConfig(obs_ridge=100.0), 0),
        ({"criterion": "random"}, ScoringConfig(), 5),
    ],
)
def test_scoring_settings_and_seed_choose_the_units(
    settings: dict[str, Any], scoring: ScoringConfig, seed: int
) -> None:
    def keep(scoring: ScoringConfig, seed: int) -> list[tuple[int, ...]]:
        model = make_model("llama", channels=40)
        calibration = CalibrationSet(BATCHES, accumulation=2, seed=seed)
        scores = score_units(model, find_blocks(model)[1::2], calibration, settings["criterion"], scoring)
        best = (scores[layer, "mlp"].argsort(descending=True)[:20] for layer in range(3))  # type: ignore[index]
        return [tuple(sorted(order.tolist())) for order in best]

    model = make_model("llama", channels=40)
    rate = 60 * find_blocks(model)[1].unit_parameters / sum(count_layer_parameters(model))
    config = make_plain(rate=rate, limits={"attention_layers": (0, 0)}, **settings)
    plan, _ = prune(model, CalibrationSet(BATCHES, accumulation=2, seed=seed), config)
    assert [kept.channels for kept in plan.layers] == keep(scoring, seed) != keep(ScoringConfig(), 0)


def test_criteria_without_text_prune_without_batches_but_not_where_something_is_measured() -> None:
    plan, _ = prune(make_model("llama"), [], make_plain(criterion="l1+random"))
    assert not plan.removes_nothing
    with pytest.raises(ValueError, match="allocation inverse and repair.method none needs at least one .*, got none"):
        prune(make_model("llama"), [], make_plain(criterion="l1", allocation="inverse"))
