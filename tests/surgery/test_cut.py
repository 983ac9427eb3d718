"""Invariants 1, 2 and 6: groups and query heads as planned; surgery equals gating; rate 0 changes no bit."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plan import plans
from transformers import PreTrainedModel

from gqaprune.models.architecture import read_geometry
from gqaprune.surgery.cut import apply_plan

from cuts import check_surgery_equals_gating, make_plan
from tiny import make_model, make_tokens


@pytest.mark.parametrize(
    ("kv_heads", "ratio"), [(2, 4), (4, 7), (3, 3), (1, 4), (4, 1)], ids=["4:1", "7:1", "3:1", "MQA", "MHA"]
)
def test_surgery_equals_gating_for_every_family_and_ratio(variant: str, kv_heads: int, ratio: int) -> None:
    model = make_model(variant, kv_heads=kv_heads, ratio=ratio)
    groups = [[0], list(range(kv_heads)), [kv_heads - 1]]
    plan = make_plan(model, groups, [[0, 3, 19], list(range(20)), list(range(1, 20, 2))])
    check_surgery_equals_gating(model, plan, make_tokens())


@pytest.mark.parametrize(("kv_heads", "ratio", "kept"), [(2, 7, 6), (3, 3, 1), (1, 4, 2)], ids=["7:1", "3:1", "MQA"])
def test_surgery_of_query_heads_equals_gating_for_every_family(
    variant: str, kv_heads: int, ratio: int, kept: int
) -> None:
    model = make_model(variant, kv_heads=kv_heads, ratio=ratio)
    last = kv_heads - 1
    queries = [
        [
            group * ratio + head
            for group in range(kv_heads)
            for head in sorted((head + group) % ratio for head in range(kept))
        ],
        None,
        [last * ratio + head for head in range(ratio - kept, ratio)],
    ]
    groups = [list(range(kv_heads)), list(range(kv_heads)), [last]]
    plan = make_plan(model, groups, [list(range(20)), [2, 3, 5], [0, 19]], queries)
    assert plan.pruned_geometry.ratios == (kept, ratio, kept)
    check_surgery_equals_gating(model, plan, make_tokens())


def test_channels_go_from_families_whose_attention_stays_whole() -> None:
    model = make_model("olmo2", kv_heads=2, ratio=2)
    with pytest.raises(ValueError, match="the plan cuts attention, which olmo2 models keep whole: one norm spans"):
        apply_plan(model, make_plan(model, [[0], [0, 1], [0, 1]], [list(range(20))] * 3))
    plan = make_plan(model, [[0, 1]] * 3, [[0, 3, 19], list(range(20)), list(range(1, 20, 2))])
    check_surgery_equals_gating(model, plan, make_tokens())


@st.composite
def models(draw: st.DrawFn) -> Callable[[], PreTrainedModel]:
    """A random tiny model, made anew at each call."""
    variant = draw(st.sampled_from(["llama-biases", "qwen2", "qwen3", "mistral-sliding", "phi3", "gemma2"]))
    shapes = {
        "kv_heads": draw(st.integers(1, 4)),
        "ratio": draw(st.integers(1, 7)),
        "head_dim": 2 * draw(st.integers(1, 5)),
        "channels": draw(st.integers(1, 12)),
        "layers": draw(st.integers(1, 3)),
    }
    return lambda: make_model(variant, **shapes)


@given(models(), st.data())
@settings(max_examples=40, deadline=None)
def test_surgery_equals_gating_for_random_geometries_and_plans(
    make: Callable[[], PreTrainedModel], data: st.DataObject
) -> None:
    model = make()
    check_surgery_equals_gating(model, data.draw(plans(read_geometry(model.config)), "plan"), make_tokens())


@given(models(), st.data())
@settings(max_examples=40, deadline=None)
def test_two_plans_in_turn_give_the_weights_of_their_composition(
    make: Callable[[], PreTrainedModel], data: st.DataObject
) -> None:
    twice, once = make(), make()
    first = data.draw(plans(read_geometry(twice.config)), "first")
    second = data.draw(plans(first.pruned_geometry), "second")
    apply_plan(twice, first)
    apply_plan(twice, second)
    apply_plan(once, first.then(second))
    assert read_geometry(once.config) == read_geometry(twice.config)
    for one, other in zip(once.state_dict().values(), twice.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    with torch.no_grad():
        assert torch.equal(once(make_tokens()).logits, twice(make_tokens()).logits)


def test_kept_kv_head_keeps_exactly_its_own_query_heads_in_order() -> None:
    model = make_model("qwen2", kv_heads=3, ratio=2, head_dim=4, layers=1)
    attention = model.model.layers[0].self_attn
    heads = {name: getattr(attention, name).weight.detach().clone() for name in ("q_proj", "k_proj", "v_proj")}
    biases = {name: getattr(attention, name).bias.detach().clone() for name in heads}
    output = attention.o_proj.weight.detach().clone()

    apply_plan(model, make_plan(model, [[0, 2]], [list(range(20))]))

    query_rows = [*range(0, 8), *range(16, 24)]  # query heads 0, 1 of KV head 0 and 4, 5 of KV head 2
    kv_rows = [*range(0, 4), *range(8, 12)]
    assert torch.equal(attention.q_proj.weight, heads["q_proj"][query_rows])
    assert torch.equal(attention.q_proj.bias, biases["q_proj"][query_rows])
    assert torch.equal(attention.k_proj.weight, heads["k_proj"][kv_rows])
    assert torch.equal(attention.v_proj.bias, biases["v_proj"][kv_rows])
    assert torch.equal(attention.o_proj.weight, output[:, query_rows])


def test_query_heads_go_without_their_kv_heads() -> None:
    model = make_model("qwen2", kv_heads=2, ratio=3, head_dim=4, layers=1)
    attention = model.model.layers[0].self_attn
    before = {name: tensor.clone() for name, tensor in attention.state_dict().items()}

    apply_plan(model, make_plan(model, [[0, 1]], [list(range(20))], [[0, 2, 3, 4]]))

    rows = [*range(0, 4), *range(8, 20)]  # query heads 0, 2 of KV head 0 and 3, 4 of KV head 1
    after = attention.state_dict()
    assert torch.equal(after["q_proj.weight"], before["q_proj.weight"][rows])
    assert torch.equal(after["q_proj.bias"], before["q_proj.bias"][rows])
    assert torch.equal(after["o_proj.weight"], before["o_proj.weight"][:, rows])
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        assert torch.equal(after[name], before[name])


def test_plan_that_removes_nothing_changes_no_bit(variant: str) -> None:
    model = make_model(variant)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_json_string()
    apply_plan(model, make_plan(model, [[0, 1]] * 3, [list(range(20))] * 3))
    assert model.config.to_json_string() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_pruned_model_can_be_pruned_again() -> None:
    model = make_model("llama", kv_heads=3)
    apply_plan(model, make_plan(model, [[0, 1], [2], [0, 1, 2]], [[1, 2, 3], list(range(10)), list(range(20))]))
    again = make_plan(model, [[1], [0], [0, 2]], [[0, 2], [5], [0]])
    check_surgery_equals_gating(model, again, make_tokens())


def test_pruned_model_generates_with_cache_as_without() -> None:
    model = make_model("qwen2-sliding", kv_heads=4, ratio=2)
    apply_plan(model, make_plan(model, [[0, 3], [1], [0, 1, 2]], [[0], [1, 2], list(range(20))]))
    options = {"max_new_tokens": 12, "do_sample": False}
    cached = model.generate(make_tokens(1), use_cache=True, **options)
    assert torch.equal(cached, model.generate(make_tokens(1), use_cache=False, **options))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_model_with_fewer_query_heads_generates_with_cache_as_without(attention: str) -> None:
    model = make_model("qwen2", kv_heads=2, ratio=3)
    model.set_attn_implementation(attention)
    apply_plan(model, make_plan(model, [[0, 1]] * 3, [[0, 1]] * 3, [[0, 1, 4, 5], None, [2, 3]]))
    options = {"max_new_tokens": 12, "do_sample": False}
    cached = model.generate(make_tokens(1), use_cache=True, **options)
    assert torch.equal(cached, model.generate(make_tokens(1), use_cache=False, **options))


def test_plan_of_another_geometry_is_refused_and_the_model_untouched() -> None:
    model, other = make_model("llama", kv_heads=2), make_model("llama", kv_heads=3)
    plan = make_plan(other, [[0], [1], [2]], [[0], [1], [2]])
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    with pytest.raises(ValueError, match="another model"):
        apply_plan(model, plan)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)
