"""Adapters of a model in training: added once, folded into the weights, out of the module's sight."""

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel

from gqaprune.training.lora import Adapters
from gqaprune.training.recovery import RecoveryConfig

from tiny import make_model, make_tokens

LORA = RecoveryConfig("lora", lora_rank=2)


def adapt(rounds_done: int = 0) -> tuple[PreTrainedModel, Adapters]:
    model, adapters = make_model("llama"), Adapters()
    adapters.add(model, LORA, rounds_done)
    return model, adapters


def read_adapters(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if "lora_A" in name}


def test_adapters_are_added_once_and_only_where_settings_ask_for_them() -> None:
    model, adapters = adapt()
    view = adapters.view
    adapters.add(model, LORA)
    assert isinstance(view, PeftModel) and adapters.view is view
    plain, none = make_model("llama"), Adapters()
    none.add(plain, RecoveryConfig("full"))
    assert none.view is None and not read_adapters(plain) and none.merge(plain) is plain


def test_each_round_and_each_run_begins_with_adapters_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    first, again, later = (read_adapters(adapt(done)[0]) for done in (0, 0, 1))
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    seeded = read_adapters(adapt()[0])
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not any(torch.equal(tensor, later[name]) for name, tensor in first.items())
    assert all(torch.equal(tensor, seeded[name]) for name, tensor in later.items())  # seed and rounds add up


def test_merged_adapters_leave_a_plain_model_with_the_same_logits() -> None:
    model, adapters = adapt()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    tokens = make_tokens()
    expected = model(tokens).logits
    merged = adapters.merge(model)
    assert adapters.view is None and merged.state_dict().keys() == make_model("llama").state_dict().keys()
    torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(make_model("llama")(tokens).logits, expected, atol=1e-2)


def test_a_module_that_holds_adapters_does_not_see_the_model_twice() -> None:
    module = nn.Module()
    module.adapters = adapt()[1]  # type: ignore[assignment]
    assert not list(module.parameters())
