"""Models with PEFT adapters are refused by every way in: their own weights are not what they compute with."""

from collections.abc import Callable
from pathlib import Path

import pytest
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from gqaprune import PruningConfig, prune
from gqaprune.checkpoints.save import save
from gqaprune.cli import main
from gqaprune.models.loading import load, load_model
from gqaprune.models.sources import load_config
from gqaprune.models.tokenizer import load_tokenizer
from gqaprune.models.wrapping import check_no_adapters
from gqaprune.placement.loading_by_layer import load_offloaded_model
from gqaprune.surgery.cut import apply_plan

from command import Run
from cuts import UNEVEN, get_logits, make_plan
from tiny import make_model, make_tokenizer, make_tokens

LORA = LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
HEAD = LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
TRAINED_NORM = LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"])
IA3 = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])


def add_in_transformers(model: PreTrainedModel) -> PreTrainedModel:
    model.add_adapter(LORA)
    return model


WAYS: dict[str, Callable[[PreTrainedModel], PreTrainedModel]] = {
    "add_adapter": add_in_transformers,
    "lora": lambda model: get_peft_model(model, LORA).get_base_model(),
    "view": lambda model: get_peft_model(model, LORA),
    "head": lambda model: get_peft_model(model, HEAD).get_base_model(),
    "trained norm": lambda model: get_peft_model(model, TRAINED_NORM),
    "ia3": lambda model: get_peft_model(model, IA3).get_base_model(),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_model_in_memory_with_adapters_is_neither_cut_nor_saved(way: str, tmp_path: Path) -> None:
    plan = make_plan(make_model("llama", kv_heads=3, ratio=2), *UNEVEN)
    model = WAYS[way](make_model("llama", kv_heads=3, ratio=2))
    for work in (
        lambda: prune(model, [make_tokens()], PruningConfig(rate=0.2)),
        lambda: apply_plan(model, plan),
        lambda: save(model, make_tokenizer(), tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=r"the model has PEFT adapters .*merge_and_unload\(\)"):
            work()
    assert not list(tmp_path.iterdir())


def test_merged_adapters_are_no_adapters(tmp_path: Path) -> None:
    view = get_peft_model(make_model("llama"), LORA)
    expected = get_logits(view)
    merged = view.merge_and_unload()
    check_no_adapters(merged)
    save(merged, None, tmp_path / "out")
    assert (get_logits(load_model(tmp_path / "out")) - expected).abs().max() < 1e-4


@pytest.fixture(params=["beside weights", "alone", "beside a GGUF file"])
def adapter_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with an adapter, which names its model."""
    folder, model = tmp_path / "adapter", make_model("llama", kv_heads=3, ratio=2)
    model.save_pretrained(tmp_path / "dense")
    if request.param == "beside weights":
        model.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    elif request.param == "beside a GGUF file":
        save(model, make_tokenizer([("e", "d")]), folder, format="gguf-f16")
    view = get_peft_model(model, LORA)
    view.peft_config["default"].base_model_name_or_path = str(tmp_path / "dense")
    view.save_pretrained(folder)
    return folder


def test_a_folder_with_an_adapter_is_refused_by_every_way_in(adapter_folder: Path, tmp_path: Path) -> None:
    for work in (
        lambda: load_config(adapter_folder),
        lambda: load_model(adapter_folder),
        lambda: load(adapter_folder),
        lambda: load_tokenizer(adapter_folder),
        lambda: load_offloaded_model(adapter_folder, tmp_path / "work"),
    ):
        with pytest.raises(ValueError, match=r"adapter has a PEFT adapter \(adapter_config.json\).*merge_and_unload"):
            work()


def test_commands_refuse_a_folder_with_an_adapter(
    adapter_folder: Path, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = str(adapter_folder)
    for command in (
        ("export", "--model", place, "--folder", "out"),
        ("inspect", place),
        ("compare", place, place),
    ):
        monkeypatch.setattr("sys.argv", ["gqaprune", *command])
        assert main() == 1
        assert "has a PEFT adapter" in capsys.readouterr().err
    assert run("prune", "--model.pretrained", str(adapter_folder)) == 1
    assert "has a PEFT adapter" in capsys.readouterr().err
    assert not Path("out").exists()


def test_an_adapter_on_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gqaprune.models.sources.find_adapter_config_file", lambda name: f"cache/{name}")
    with pytest.raises(ValueError, match="cannot load a model from 'owner/name'.* it has a PEFT adapter"):
        load_model("owner/name")


def test_the_way_out_that_is_named_leads_to_a_model(tmp_path: Path) -> None:
    model = add_in_transformers(make_model("llama"))
    expected = get_logits(model)
    model.save_pretrained(tmp_path / "adapter")
    view = PeftModel.from_pretrained(make_model("llama"), tmp_path / "adapter")
    view.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert (get_logits(load_model(tmp_path / "merged")) - expected).abs().max() < 1e-4
