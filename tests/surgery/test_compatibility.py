"""Models of families that are not known: those that are Llamas in all but name are pruned, all others refused."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from gqaprune import PruningConfig, prune
from gqaprune.checkpoints.save import save
from gqaprune.surgery.compatibility import check_compatibility
from gqaprune.surgery.cut import apply_plan

from cuts import check_surgery_equals_gating, get_logits, make_plan
from tiny import make_model, make_tokens, make_unknown

UNEVEN = ([[0, 2], [0, 1, 2, 3], [3]], [[0, 3, 19], list(range(20)), list(range(1, 20, 2))])
ALIKE = ["gemma", "cohere", "cohere2", "cwm", "ernie4_5", "internlm3", "ministral", "olmo", "seed_oss", "vaultgemma"]


@pytest.mark.parametrize("family", ALIKE)
def test_llamas_in_all_but_name_are_cut_as_gated_and_saved(family: str, tmp_path: Path) -> None:
    model = make_unknown(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = get_logits(model)
    check_compatibility(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(get_logits(model), expected)
    check_surgery_equals_gating(model, make_plan(model, *UNEVEN), make_tokens())
    assert save(model, None, tmp_path / "out") == "per-layer"
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(get_logits(plain), get_logits(model))
    model = make_unknown(family)
    apply_plan(model, make_plan(model, [[0, 2]] * 3, [list(range(7))] * 3))
    assert save(model, None, tmp_path / "even") == "stock"
    assert torch.equal(get_logits(AutoModelForCausalLM.from_pretrained(tmp_path / "even")), get_logits(model))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("diffllama", r"layer 0 has a parameter self_attn\.lambda_q1 of shape \[8\]"),
        ("apertus", r"layer 0 has a parameter mlp\.act_fn\.alpha_p"),
        ("glm4", r"layer 0 has a parameter mlp\.gate_up_proj\.weight of shape \[40, 32\]"),
        ("granite_swa", r"layer 0 has a parameter self_attn\.sinks"),
        ("arcee", r"layer 0 has no mlp\.gate_proj"),
        ("nanochat", r"layer 0 has a parameter mlp\.fc1\.weight"),
    ],
)
def test_others_are_refused_with_what_is_different(family: str, reason: str) -> None:
    model = make_unknown(family)
    with pytest.raises(ValueError, match=f"type '{family}' cannot be pruned yet: {reason}.*; supported types"):
        prune(model, [make_tokens()], PruningConfig(rate=0.2))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("helium", r"after a cut self_attn\.o_proj\.weight has shape \[32, 24\], its config asks for \[32, 32\]"),
        ("stablelm", r"its first layer cannot be built after a cut \(hidden_size must be"),
    ],
)
def test_those_that_would_be_cut_to_what_nothing_loads_are_refused(family: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"type '{family}' cannot be pruned yet: {reason}.*; supported types"):
        check_compatibility(make_unknown(family, head_dim=4))


def rename(model: PreTrainedModel) -> PreTrainedModel:
    """The model, as if its family were not known."""
    model.config.model_type = "stranger"
    return model


def test_a_layer_that_adds_something_else_is_refused() -> None:
    model = rename(make_model("exaone4"))  # whose outputs pass a norm
    with pytest.raises(ValueError, match="its first layer does not just add attention and MLP to the residual stream"):
        check_compatibility(model)


def test_a_norm_over_all_heads_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer 0 has a parameter self_attn\.q_norm\.weight of shape \[48\]"):
        check_compatibility(rename(make_model("olmo2")))


def test_an_mlp_that_a_cut_changes_otherwise_is_refused() -> None:
    model = rename(make_model("llama"))
    assert isinstance(model, LlamaForCausalLM)
    check_compatibility(copy.deepcopy(model))
    mlp = model.model.layers[0].mlp
    mlp.act_fn = nn.Softmax(dim=-1)  # channels that see each other
    with pytest.raises(ValueError, match="computes something else with units removed than with their gates at 0"):
        check_compatibility(model)


def test_mixtures_of_experts_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="models of type 'olmoe' cannot be pruned yet; supported types"):
        prune(make_unknown("olmoe", num_experts=2), [make_tokens()], PruningConfig(rate=0.2))
