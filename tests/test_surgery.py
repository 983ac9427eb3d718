"""Invariants 1, 2 and 6: whole groups with their own query heads; surgery equals gating; rate 0 changes no bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from gqaprune.architecture import find_blocks, read_geometry
from gqaprune.gates import apply_gates
from gqaprune.plan import KeptUnits, PruningPlan
from gqaprune.surgery import apply_plan

from tiny import make_model, make_tokens


def make_plan(model: PreTrainedModel, groups: list[list[int]], channels: list[list[int]]) -> PruningPlan:
    layers = tuple(KeptUnits(tuple(g), tuple(c)) for g, c in zip(groups, channels, strict=True))
    return PruningPlan(read_geometry(model.config), layers)


def gate_logits(model: PreTrainedModel, plan: PruningPlan, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the dense model with the removed units' gates at 0."""
    blocks = find_blocks(model)
    gates = {}
    for block in blocks:
        kept = plan.layers[block.key.layer]
        gates[block.key] = torch.zeros(1, block.units)
        gates[block.key][:, list(kept.groups if block.key.kind == "attention" else kept.channels)] = 1
    with torch.no_grad(), apply_gates(blocks, gates):
        return model(tokens).logits


def check_surgery_equals_gating(model: PreTrainedModel, plan: PruningPlan, tokens: torch.Tensor) -> None:
    expected = gate_logits(model, plan, tokens)
    apply_plan(model, plan)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected, atol=1e-4, rtol=0)
    assert read_geometry(model.config) == plan.pruned_geometry


@pytest.mark.parametrize(
    ("kv_heads", "ratio"), [(2, 4), (4, 7), (3, 3), (1, 4), (4, 1)], ids=["4:1", "7:1", "3:1", "MQA", "MHA"]
)
def test_surgery_equals_gating_for_every_family_and_ratio(variant: str, kv_heads: int, ratio: int) -> None:
    model = make_model(variant, kv_heads=kv_heads, ratio=ratio)
    groups = [[0], list(range(kv_heads)), [kv_heads - 1]]
    plan = make_plan(model, groups, [[0, 3, 19], list(range(20)), list(range(1, 20, 2))])
    check_surgery_equals_gating(model, plan, make_tokens())


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_surgery_equals_gating_for_random_geometries_and_plans(data: st.DataObject) -> None:
    kv_heads = data.draw(st.integers(1, 4), "kv_heads")
    channels = data.draw(st.integers(1, 12), "channels")
    layers = data.draw(st.integers(1, 3), "layers")
    model = make_model(
        data.draw(st.sampled_from(["llama-biases", "qwen2", "qwen3", "mistral-sliding"]), "variant"),
        kv_heads=kv_heads,
        ratio=data.draw(st.integers(1, 7), "ratio"),
        head_dim=2 * data.draw(st.integers(1, 5), "half head_dim"),
        channels=channels,
        layers=layers,
    )

    def units(count: int) -> st.SearchStrategy[list[int]]:
        return st.sets(st.integers(0, count - 1), min_size=1).map(sorted)

    groups = [data.draw(units(kv_heads)) for _ in range(layers)]
    plan = make_plan(model, groups, [data.draw(units(channels)) for _ in range(layers)])
    check_surgery_equals_gating(model, plan, make_tokens())


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


def test_plan_of_another_geometry_is_refused_and_the_model_untouched() -> None:
    model, other = make_model("llama", kv_heads=2), make_model("llama", kv_heads=3)
    plan = make_plan(other, [[0], [1], [2]], [[0], [1], [2]])
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    with pytest.raises(ValueError, match="another model"):
        apply_plan(model, plan)
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)
