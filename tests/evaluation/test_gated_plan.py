"""A plan as gates on the dense model: equal to surgery, whole, in parts, and layer by layer."""

import copy
from dataclasses import replace

import pytest
import torch

from gqaprune.data.windows import make_batches
from gqaprune.evaluation.gated_plan import GatedPlan, measure_perplexity_or_infinity
from gqaprune.models.architecture import find_blocks
from gqaprune.plan import BlockKey, KeptUnits, PruningPlan
from gqaprune.planning.selection import keep_everything
from gqaprune.surgery.cut import apply_plan, cut_block

from tiny import make_model, make_tokens

TOKENS = make_tokens(3, 16)
BATCHES = make_batches(TOKENS, TOKENS, 2)


def cut_by_hand(plan: PruningPlan, variant: str = "llama") -> float:
    """Perplexity of the model that surgery leaves."""
    model = make_model(variant)
    apply_plan(model, plan)
    return measure_perplexity_or_infinity(model, BATCHES, "")


def make_plan(variant: str = "llama", **layers: KeptUnits) -> PruningPlan:
    """A plan with its own kept units in layers named `layer0` and so on."""
    whole = keep_everything(make_model(variant))
    kept = [layers.get(f"layer{index}", units) for index, units in enumerate(whole.layers)]
    return replace(whole, layers=tuple(kept))


PLAN = make_plan(layer0=KeptUnits((1,), tuple(range(20))), layer2=KeptUnits((0, 1), tuple(range(3, 15))))
QUERIES = make_plan(layer1=KeptUnits((0, 1), tuple(range(9)), queries=(0, 2, 3, 4)))


@pytest.mark.parametrize("plan", [PLAN, QUERIES])
def test_gates_give_the_perplexity_of_the_cut(plan: PruningPlan) -> None:
    gated = GatedPlan(make_model(), plan)
    assert gated.measure(gated.gates, BATCHES) == pytest.approx(cut_by_hand(plan), rel=1e-5)
    assert gated.measure({}, BATCHES) == pytest.approx(
        measure_perplexity_or_infinity(make_model(), BATCHES, ""), rel=1e-6
    )


def test_each_layer_restored_by_itself_is_the_plan_without_it() -> None:
    gated = GatedPlan(make_model(), PLAN)
    expected = {
        0: cut_by_hand(make_plan(layer2=PLAN.layers[2])),
        2: cut_by_hand(make_plan(layer0=PLAN.layers[0])),
    }
    assert gated.measure_restoring_each(list(TOKENS.split(2))) == pytest.approx(expected, rel=1e-5)
    assert gated.measure(gated.restore_layers([0]), BATCHES) == pytest.approx(expected[0], rel=1e-5)


def test_units_let_through_again_are_as_if_they_had_stayed() -> None:
    gated = GatedPlan(make_model(), PLAN)
    assert gated.list_removed(BlockKey(2, "mlp")) == {0, 1, 2, 15, 16, 17, 18, 19}
    more = make_plan(layer0=PLAN.layers[0], layer2=KeptUnits((0, 1), (0, *range(3, 15))))
    restored = gated.restore_units({BlockKey(2, "mlp"): [0]})
    assert gated.measure(restored, BATCHES) == pytest.approx(cut_by_hand(more), rel=1e-5)


def test_other_scores_take_as_many_units_or_a_share_of_them() -> None:
    gated = GatedPlan(make_model(), PLAN)
    scores = {block.key: torch.arange(block.units).double() for block in gated.blocks}
    assert {key: int((gate == 0).sum()) for key, gate in gated.choose_by_scores(scores).items()} == {
        BlockKey(0, "attention"): 1,
        BlockKey(2, "mlp"): 8,
    }
    assert gated.choose_by_scores(scores)[BlockKey(2, "mlp")][0, :8].sum() == 0
    assert int((gated.choose_by_scores(scores, 0.5)[BlockKey(2, "mlp")] == 0).sum()) == 4


def test_surgery_is_what_gating_is_in_every_family(variant: str) -> None:
    plan = make_plan(variant, layer0=KeptUnits((1,), tuple(range(20))), layer1=KeptUnits((0, 1), tuple(range(9))))
    model = make_model(variant)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert GatedPlan(model, plan).find_wrong_cuts(TOKENS) == []
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert [block.units for block in find_blocks(model)] == [block.units for block in GatedPlan(model, plan).blocks]


def test_query_heads_on_another_kv_head_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_wrongly(model, plan, block, heads):  # type: ignore[no-untyped-def]
        cut_block(model, plan, block, heads)
        if block.key == BlockKey(0, "attention"):
            with torch.no_grad():  # the query heads of the group that went
                attention, dense = model.model.layers[0].self_attn, make_model().model.layers[0].self_attn
                attention.q_proj.weight.copy_(dense.q_proj.weight[:24])

    monkeypatch.setattr("gqaprune.evaluation.gated_plan.cut_block", cut_wrongly)
    assert GatedPlan(make_model(), PLAN).find_wrong_cuts(TOKENS) == [0]


def test_a_loss_that_is_not_finite_is_infinite() -> None:
    model = copy.deepcopy(make_model())
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    assert measure_perplexity_or_infinity(model, BATCHES, "") == float("inf")
