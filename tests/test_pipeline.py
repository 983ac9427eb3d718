"""The whole path without Lightning: what prune does to a model, and what it refuses."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from gqaprune import PruningConfig, apply_plan, prune
from gqaprune.checkpoints.formats import choose_format
from gqaprune.common.stage_cache import StageCache
from gqaprune.data.calibration import CalibrationSet
from gqaprune.data.windows import make_batches
from gqaprune.models.architecture import count_layer_parameters, count_parameters, find_blocks, read_geometry
from gqaprune.pipeline import Pruner
from gqaprune.plan import KeptUnits, PruningPlan
from gqaprune.scoring.scores import score_units

from tiny import make_model, make_plain, make_tokens

BATCHES = [make_tokens(2, seed=seed) for seed in range(3)]


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("rate_base", ["decoder", "all"])
def test_budget_is_met_within_one_unit(variant: str, allocation: str, rate_base: str) -> None:
    model = make_model(variant, kv_heads=4, ratio=2)
    count = count_parameters if rate_base == "all" else lambda m: sum(count_layer_parameters(m))
    before, step = count(model), max(block.unit_parameters for block in find_blocks(model))
    if allocation == "uniform":  # its step is a channel in every layer
        step = sum(block.unit_parameters for block in find_blocks(model) if block.key.kind == "mlp")
    plan, report = prune(model, BATCHES, make_plain(rate=0.25, allocation=allocation, rate_base=rate_base))
    assert abs((before - count(model)) - 0.25 * before) <= step
    assert report.rate_reached == pytest.approx(1 - count(model) / before)
    assert read_geometry(model.config) == plan.pruned_geometry


def test_every_layer_keeps_its_ratio() -> None:
    model = make_model("qwen2", kv_heads=4, ratio=7)
    plan, _ = prune(model, BATCHES, make_plain(rate=0.4, allocation="global"))
    assert not plan.removes_nothing
    assert plan.pruned_geometry.ratios == (7, 7, 7)
    assert "✅ every layer keeps 7:1" in plan.describe_ratio()


def test_weakest_units_go() -> None:
    model = make_model("llama")
    with torch.no_grad():
        for layer, channel in ((0, 3), (1, 11), (2, 0)):
            model.model.layers[layer].mlp.down_proj.weight[:, channel] *= 1e-3
    plan, _ = prune(model, BATCHES, make_plain(rate=0.012, limits={"attention_layers": (0, 0)}))
    removed = [set(range(20)) - set(kept.channels) for kept in plan.layers]
    assert removed == [{3}, {11}, {0}]


def test_same_data_gives_the_same_plan_and_the_plan_gives_the_same_weights() -> None:
    first, second, dense = make_model("qwen3"), make_model("qwen3"), make_model("qwen3")
    config = make_plain(rate=0.3, allocation="global")
    plan, _ = prune(first, BATCHES, config)
    again, _ = prune(second, BATCHES, config)
    assert plan == again
    apply_plan(dense, PruningPlan.from_dict(plan.to_dict()))
    for one, other in zip(first.state_dict().values(), dense.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("settings", [{"kv_rate": 0.2}, {"granularity": "query"}, {"split": "3:7"}], ids=str)
def test_attention_of_families_that_keep_it_whole_is_not_asked_to_give(settings: dict[str, Any]) -> None:
    model = make_model("olmo2")
    with pytest.raises(ValueError, match="attention of olmo2 models stays whole: one norm spans all its query heads"):
        prune(model, BATCHES, PruningConfig(rate=0.2, criterion="l2", repair={"method": "none"}, **settings))
    for split in (None, "free"):
        model = make_model("olmo2")
        plan, _ = prune(
            model,
            BATCHES,
            PruningConfig(rate=0.2, split=split, limits={"attention_layers": (0, 3), "mlp_layers": (0, 3)}),
        )
        assert plan.pruned_geometry.query_heads == plan.geometry.query_heads
        assert sum(plan.pruned_geometry.channels) < sum(plan.geometry.channels)


def test_rate_zero_changes_no_bit_and_needs_no_text(any_variant: str) -> None:
    model = make_model(any_variant)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plan, report = prune(model, [], make_plain(rate=0.0))
    assert plan.removes_nothing and report.rate_reached == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layers_outside_the_ranges_stay_whole() -> None:
    model = make_model("llama", kv_heads=4, layers=5)
    plan, _ = prune(model, BATCHES, make_plain(rate=0.2, limits={"attention_layers": (1, 3), "mlp_layers": (2, 4)}))
    assert [len(kept.groups) == 4 for kept in plan.layers] == [True, False, False, True, True]
    assert [len(kept.channels) == 20 for kept in plan.layers] == [True, True, False, False, True]


def test_limits_hold() -> None:
    model = make_model("llama", kv_heads=4, channels=32)
    config = make_plain(
        rate=0.4,
        allocation="global",
        limits={"min_groups": 2, "min_channels": 8, "channel_multiple": 8, "max_rate": 0.6},
    )
    whole = count_layer_parameters(model)
    plan, _ = prune(model, BATCHES, config)
    for kept, before, after in zip(plan.layers, whole, count_layer_parameters(model), strict=True):
        assert len(kept.groups) >= 2 and len(kept.channels) >= 8 and len(kept.channels) % 8 == 0
        assert 1 - after / before <= 0.6


@pytest.mark.parametrize("granularity", ["group", "query"])
@pytest.mark.parametrize("variant", ["llama-biases", "gemma2"])
def test_uniform_counts_of_the_whole_model_are_such_that_a_stock_class_has_them(variant: str, granularity: str) -> None:
    whole = {"limits": {"attention_layers": (0, 3), "mlp_layers": (0, 3)}}
    model = make_model(variant, kv_heads=4, ratio=4, channels=64)  # width 64, which 12 heads do not divide
    settings = {"granularity": granularity, "split": "free", **whole}
    plan, _ = prune(model, BATCHES, make_plain(rate=0.25, allocation="uniform", **settings))
    assert set(plan.pruned_geometry.query_heads) in ({16}, {8})
    assert choose_format(model.config, "auto") == "stock"
    model = make_model(variant, kv_heads=4, ratio=4, channels=64)
    plan, _ = prune(
        model, BATCHES, make_plain(rate=0.25, allocation="uniform", **settings | {"limits": {"mlp_layers": (0, 2)}})
    )
    assert set(plan.pruned_geometry.query_heads) == {12} and choose_format(model.config, "auto") == "per-layer"


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_query_heads_go_alike_from_every_group_and_the_budget_is_met(variant: str, allocation: str) -> None:
    model = make_model(variant, kv_heads=2, ratio=7)
    before, blocks = sum(count_layer_parameters(model)), find_blocks(model, "query")
    step = max(block.unit_parameters * block.groups for block in blocks)
    if allocation == "uniform":
        step = sum(block.unit_parameters for block in blocks if block.key.kind == "mlp")
    plan, _ = prune(model, BATCHES, make_plain(rate=0.25, allocation=allocation, granularity="query"))
    assert abs(before - sum(count_layer_parameters(model)) - 0.25 * before) <= step
    pruned = read_geometry(model.config)
    assert pruned == plan.pruned_geometry
    assert pruned.kv_heads == (2, 2, 2)
    assert min(pruned.ratios) < 7


def test_seven_query_heads_on_a_kv_head_become_six() -> None:
    model = make_model("qwen2", kv_heads=2, ratio=7)
    with torch.no_grad():
        for layer, weak in enumerate([(2, 13), (0, 7), (6, 10)]):  # one of each group: columns of 8 per head
            for head in weak:
                model.model.layers[layer].self_attn.o_proj.weight[:, head * 8 : head * 8 + 8] *= 1e-3
    attention = [block for block in find_blocks(model, "query") if block.key.kind == "attention"]
    rate = sum(2 * block.unit_parameters for block in attention) / sum(count_layer_parameters(model))
    plan, report = prune(model, BATCHES, make_plain(rate=rate, granularity="query", limits={"mlp_layers": (0, 0)}))
    removed = [set(range(14)) - set(plan.list_queries(layer)) for layer in range(3)]
    assert removed == [{2, 13}, {0, 7}, {6, 10}]
    assert plan.describe_ratio() == "GQA ratio: ✅ 7:1 → 6:1 in every layer"
    dense, pruned = report.stages
    assert dense.kv_cache_bytes_per_token == pruned.kv_cache_bytes_per_token


def test_a_group_with_two_weak_heads_does_not_give_both() -> None:
    model = make_model("llama", kv_heads=2, ratio=3, layers=1)
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, :16] *= 1e-3  # query heads 0 and 1, both of KV head 0
    cost = find_blocks(model, "query")[0].unit_parameters * 2
    config = make_plain(
        rate=cost / sum(count_layer_parameters(model)), granularity="query", limits={"mlp_layers": (0, 0)}
    )
    plan, _ = prune(model, BATCHES, config)
    assert len({0, 1} - set(plan.list_queries(0))) == 1
    assert len({3, 4, 5} - set(plan.list_queries(0))) == 1


def test_one_query_head_of_a_group_always_stays() -> None:
    model = make_model("llama", kv_heads=1, ratio=4)
    with pytest.raises(ValueError, match="nearest reachable rate is 0"):
        prune(
            model,
            BATCHES,
            make_plain(rate=0.45, allocation="global", granularity="query", limits={"mlp_layers": (0, 0)}),
        )
    heads = [block for block in find_blocks(model, "query") if block.key.kind == "attention"]
    rate = sum(3 * block.unit_parameters for block in heads) / sum(count_layer_parameters(model))
    config = make_plain(
        rate=rate, allocation="global", granularity="query", limits={"mlp_layers": (0, 0), "min_groups": 9}
    )
    prune(model, BATCHES, config)  # min_groups has nothing to say here: KV heads stay
    assert read_geometry(model.config).query_heads == (1, 1, 1)


@pytest.mark.parametrize("granularity", ["group", "query"])
@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_several_steps_meet_the_budget_and_their_plan_leads_from_the_dense_model(
    allocation: str, granularity: str
) -> None:
    model, dense = (make_model("qwen2", kv_heads=4, ratio=3, channels=40) for _ in range(2))
    config = make_plain(rate=0.3, allocation=allocation, granularity=granularity, steps=3)
    before, blocks = sum(count_layer_parameters(model)), find_blocks(model, granularity)
    step = max(block.unit_parameters * block.groups for block in blocks)
    if allocation == "uniform":
        step = sum(block.unit_parameters for block in blocks if block.key.kind == "mlp")
    plan, _ = prune(model, CalibrationSet(BATCHES, source="tiny", seed=7, corpora=("text",)), config)
    assert abs(before - sum(count_layer_parameters(model)) - 0.3 * before) <= step
    assert (plan.model, plan.seed, plan.corpora, plan.rate) == ("tiny", 7, ("text",), 0.3)
    assert plan.geometry == read_geometry(dense.config)
    apply_plan(dense, PruningPlan.from_dict(plan.to_dict()))
    for one, other in zip(model.state_dict().values(), dense.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    if allocation == "uniform":
        assert read_geometry(model.config).is_uniform and not model.config.is_heterogeneous


def test_every_step_scores_what_the_one_before_left(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def score(model: PreTrainedModel, *arguments: Any) -> Any:
        seen.append(sum(count_layer_parameters(model)))
        return score_units(model, *arguments)

    monkeypatch.setattr("gqaprune.planning.selection.score_units", score)
    model = make_model("llama", kv_heads=4, channels=60)
    dense = sum(count_layer_parameters(model))
    prune(model, BATCHES, make_plain(rate=0.3, allocation="global", steps=3))
    channel = find_blocks(model)[1].unit_parameters
    assert seen[0] == dense
    for parameters, share in zip(seen, (0, 0.1, 0.2), strict=True):
        assert 0 <= parameters - (1 - share) * dense <= 2 * channel


def test_two_steps_remove_the_weakest_and_then_the_weakest_of_what_is_left() -> None:
    model = make_model("llama", layers=1)
    mlp = find_blocks(model)[1]
    config = make_plain(
        rate=6 * mlp.unit_parameters / sum(count_layer_parameters(model)), limits={"attention_layers": (0, 0)}
    )
    stages = copy.deepcopy(model)
    left = list(range(20))
    for _ in range(2):
        block = find_blocks(stages)[1]
        weakest_first = score_units(stages, [block], BATCHES, "fisher")[block.key].argsort().tolist()
        kept = sorted(weakest_first[3:])
        apply_plan(stages, PruningPlan(read_geometry(stages.config), (KeptUnits((0, 1), tuple(kept)),)))
        left = [left[position] for position in kept]

    one_cut, _ = prune(copy.deepcopy(model), BATCHES, config)
    two_cuts, _ = prune(model, BATCHES, replace(config, steps=2))
    assert two_cuts.layers[0].channels == tuple(left)
    assert len(one_cut.layers[0].channels) == 14 and one_cut.layers != two_cuts.layers


def test_limits_of_several_steps_are_those_of_the_dense_layers() -> None:
    model = make_model("llama", kv_heads=4, channels=32)
    whole = count_layer_parameters(model)
    config = make_plain(
        rate=0.4,
        allocation="global",
        steps=4,
        limits={"min_groups": 2, "min_channels": 8, "channel_multiple": 8, "max_rate": 0.6},
    )
    plan, _ = prune(model, BATCHES, config)
    for kept, before, after in zip(plan.layers, whole, count_layer_parameters(model), strict=True):
        assert len(kept.groups) >= 2 and len(kept.channels) >= 8 and len(kept.channels) % 8 == 0
        assert 1 - after / before <= 0.6


def test_report_measures_before_and_after_on_the_evaluation_text() -> None:
    model = make_model("llama")
    evaluation = {"test/text": make_batches(make_tokens(4, seed=9), make_tokens(4, seed=9), 2)}
    _, report = prune(model, BATCHES, make_plain(rate=0.3), evaluation=evaluation)
    dense, pruned = report.stages
    tokens = make_tokens(4, seed=9)
    assert dense.perplexity["test/text"] == pytest.approx(float(make_model("llama")(tokens, labels=tokens).loss.exp()))
    assert pruned.perplexity["test/text"] == pytest.approx(float(model(tokens, labels=tokens).loss.exp()))
    assert pruned.decoder_parameters == sum(count_layer_parameters(model)) < dense.decoder_parameters


def test_plan_says_where_it_came_from() -> None:
    config = make_plain(rate=0.3, criterion="taylor")
    plan, _ = prune(
        make_model("llama"), CalibrationSet(BATCHES, source="tiny", seed=7, corpora=("embedded@train",)), config
    )
    assert (plan.model, plan.criterion, plan.allocation, plan.seed) == ("tiny", "taylor", "uniform", 7)
    assert (plan.corpora, plan.rate, plan.rate_base) == (("embedded@train",), 0.3, "decoder")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"limits": {"mlp_layers": (1, 4)}}, r"mlp_layers must satisfy 0 <= first <= end <= 3.*got \[1, 4\]"),
        ({"limits": {"attention_layers": (2, 1)}}, r"attention_layers must satisfy.*got \[2, 1\]"),
        ({"rate": 0.95}, "nearest reachable rate is 0"),
        ({"rate": 0.95, "allocation": "global"}, "nearest reachable rate is 0"),
        ({"limits": {"attention_layers": (0, 0), "mlp_layers": (2, 2)}}, "leave no block to prune"),
    ],
)
def test_budget_that_cannot_be_met_is_refused_before_anything_is_cut(
    settings: dict[str, object], sentence: str
) -> None:
    model = make_model("llama")
    parameters = count_parameters(model)
    with pytest.raises(ValueError, match=sentence):
        prune(model, BATCHES, make_plain(**settings))  # type: ignore[arg-type]
    assert count_parameters(model) == parameters


def test_budget_that_cannot_be_met_is_refused_before_scoring() -> None:
    impossible = [torch.full((1, 8), 10_000)]  # ids that no model has: scoring them would fail otherwise
    with pytest.raises(ValueError, match="nearest reachable rate"):
        prune(make_model("llama"), impossible, make_plain(rate=0.95))


def test_pruning_without_calibration_text_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one calibration batch"):
        prune(make_model("llama"), [], make_plain(rate=0.1))


def test_nan_weights_stop_before_anything_is_cut() -> None:
    model = make_model("llama")
    model.model.layers[0].self_attn.v_proj.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="weights of layer 0"):
        prune(model, BATCHES, make_plain(rate=0.1))
    assert read_geometry(model.config).kv_heads == (2, 2, 2)


def test_default_recipe_repairs_what_it_cuts() -> None:
    """Nearer to the dense model than the same cut alone, on the calibration text; every later block is refitted."""
    batches = [make_tokens(8, 32, seed=seed) for seed in range(5)]
    tokens, dense = torch.cat(batches), make_model("qwen2", channels=40)
    target = dense(tokens).logits.log_softmax(-1)

    def measure_distance(model: PreTrainedModel) -> float:
        found = model(tokens).logits.log_softmax(-1)
        return float(torch.nn.functional.kl_div(found, target, log_target=True, reduction="sum").detach())

    repaired, cut = make_model("qwen2", channels=40), make_model("qwen2", channels=40)
    plan, report = prune(repaired, batches, PruningConfig(rate=0.2))
    apply_plan(cut, plan)
    assert measure_distance(repaired) < 0.9 * measure_distance(cut)
    assert all(kept.groups == (0, 1) for kept in plan.layers)  # channels alone
    assert [str(repair.key) for repair in report.repairs][:2] == ["layer 0 mlp", "layer 1 attention"]
    assert report.to_dict()["repairs"][0]["key"] == "layer 0 mlp"
    assert report.describe_repair().startswith("repair: ")


def test_scores_of_the_last_cut_stay_with_the_pruner_and_are_read_back_with_its_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut() -> Pruner:
        pruner = Pruner(
            make_model("llama"), CalibrationSet([make_tokens()]), make_plain(rate=0.2), stages=StageCache(tmp_path)
        )
        pruner.measure("dense")
        pruner.spend()
        return pruner

    first = cut()
    assert {key.kind for key in first.scores} == {"attention", "mlp"} and first.importance == {}
    (block,) = (block for block in first.dense_blocks if str(block.key) == "layer 1 mlp")
    outliers = [outlier for outlier in first.report.outliers if outlier.key == block.key]
    assert len(first.scores[block.key]) == block.units - len(outliers)
    monkeypatch.setattr("gqaprune.planning.choice.score_blocks", None)  # nothing is scored again
    again = cut()
    assert again.scores.keys() == first.scores.keys()
    assert all(torch.equal(again.scores[key], score_U) for key, score_U in first.scores.items())


@pytest.mark.parametrize(
    "settings", [{"repair": {"method": "bias"}}, {"repair": {"method": "least_squares", "bias": True}}]
)
def test_biases_without_a_place_are_refused_before_anything_is_scored(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gqaprune.planning.selection.score_units", lambda *_: pytest.fail("scored"))
    with pytest.raises(
        ValueError, match="qwen2 checkpoints cannot store a bias of .*: set pruning.repair.bias to false"
    ):
        prune(make_model("qwen2"), BATCHES, make_plain(rate=0.2, **settings))


def test_a_model_that_transformers_does_not_save_is_refused_untouched() -> None:
    model = make_model("llama")
    before = copy.deepcopy(model.state_dict())
    model.config._output_attentions = True  # which sdpa does not give
    with pytest.raises(ValueError, match=r"transformers refuses to save the model: .*; correct its config.json"):
        prune(model, [make_tokens()], make_plain(rate=0.3))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
