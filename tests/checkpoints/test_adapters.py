"""Adapters in checkpoints: merged weights are those of peft, and what is saved beside them loads in peft."""

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from gqaprune.checkpoints.adapters import merge_adapters, save_adapters
from gqaprune.checkpoints.save import save
from gqaprune.training.lora import add_adapters
from gqaprune.training.recovery import RecoveryConfig

from tiny import make_model, make_tokens


def adapt() -> tuple[PreTrainedModel, PeftModel]:
    """A model with adapters that change its logits."""
    model = make_model("llama")
    adapted = add_adapters(model, RecoveryConfig("lora", lora_rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model, adapted


def test_merged_weights_are_those_that_peft_merges_and_the_model_keeps_its_own() -> None:
    model, adapted = adapt()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merged = merge_adapters(adapted, model.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    expected = adapted.merge_and_unload().state_dict()
    torch.testing.assert_close(merged, dict(expected))


def test_saved_adapters_give_the_dense_model_the_same_logits(tmp_path: Path) -> None:
    model, adapted = adapt()
    save_adapters(adapted, model.state_dict(), tmp_path)
    loaded, tokens = PeftModel.from_pretrained(make_model("llama"), str(tmp_path)), make_tokens()
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)


def test_neither_adding_nor_saving_adapters_warns_or_asks_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object) -> bool:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", ask)
    model = make_model("llama")
    model.config._name_or_path = "no/such-model"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapted = add_adapters(model, RecoveryConfig("lora", lora_rank=2))
        save_adapters(adapted, model.state_dict(), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["q_proj"], use_dora=True),
        LoraConfig(target_modules=["embed_tokens"]),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]),
    ],
    ids=["dora", "embedding", "trained norm"],
)
def test_adapters_that_are_no_product_beside_a_weight_are_refused(config: PeftConfig, tmp_path: Path) -> None:
    view = get_peft_model(make_model("llama"), config)
    with pytest.raises(ValueError, match=r"adapters, which cannot be merged on saving: .* merge_and_unload\(\)"):
        save(view.get_base_model(), None, tmp_path / "out", adapted=view)
    assert not list(tmp_path.iterdir())


def test_adapters_that_are_in_the_weights_already_are_not_merged_again() -> None:
    model, adapted = adapt()
    adapted.merge_adapter()
    with pytest.raises(ValueError, match="cannot be merged on saving"):
        merge_adapters(adapted, model.state_dict())
