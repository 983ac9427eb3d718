"""What `inspect` says of a checkpoint beyond its sizes: layers, reachable rates, risks, and settings to begin with."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, Qwen2Config

import gqaprune
from gqaprune import PruningConfig, prune
from gqaprune.cli import main
from gqaprune.commands.checkup import check_layers, find_wrong_tensors, read_plan_of
from gqaprune.commands.inspect import inspect
from gqaprune.commands.reach import measure_reach
from gqaprune.commands.risks import list_risks
from gqaprune.models.architecture import count_layer_parameters, read_geometry
from gqaprune.models.sources import load_config
from gqaprune.plan import BlockKey
from gqaprune.planning.selection import keep_everything
from gqaprune.surgery.cut import apply_plan

from cuts import make_plan
from tiny import WHOLE_ATTENTION, WHOLE_MLP, make_model


@pytest.fixture
def pruned_folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny model whose layers lost different units."""
    model = make_model("qwen2")
    plan = replace(make_plan(model, [[0, 1], [0], [1]], [list(range(20)), [0, 1], [3]]), model="the base")
    apply_plan(model, plan)
    gqaprune.save(model, tokenizer, tmp_path / "pruned", plan)
    return tmp_path / "pruned"


def check(folder: Path) -> list[Any]:
    config = load_config(folder)
    return check_layers(config, read_plan_of(folder), find_wrong_tensors(folder, config))


def test_every_layer_of_a_sound_checkpoint_passes_with_what_it_lost(pruned_folder: Path) -> None:
    checks = check(pruned_folder)
    assert [(own.keeps_ratio, own.wrong_tensors) for own in checks] == [(True, ())] * 3
    assert [own.shape for own in checks] == ["6Q:2KV (3:1)  MLP 20", "3Q:1KV (3:1)  MLP 2", "3Q:1KV (3:1)  MLP 1"]
    assert [own.removed for own in checks] == [
        "",
        "3 of 6 query heads, 1 of 2 KV heads, 18 of 20 channels",
        "3 of 6 query heads, 1 of 2 KV heads, 19 of 20 channels",
    ]


def test_a_tensor_of_another_shape_than_the_config_says_is_named_in_its_layer(pruned_folder: Path) -> None:
    file = pruned_folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.2.self_attn.q_proj.weight"] = torch.zeros(16, 24)
    save_file(tensors, file, {"format": "pt"})
    checks = check(pruned_folder)
    assert [bool(own.wrong_tensors) for own in checks] == [False, False, True]
    assert "q_proj.weight has shape [16, 24], but the config says [24, 24]" in checks[2].wrong_tensors[0]


def test_a_layer_with_another_ratio_than_its_plan_is_marked(pruned_folder: Path) -> None:
    plan = json.loads((pruned_folder / "plan.json").read_text())
    plan["geometry"]["query_heads"][1] = 4  # a base with 2:1 there
    (pruned_folder / "plan.json").write_text(json.dumps(plan))
    checks = check(pruned_folder)
    assert checks[1].removed.startswith("2 of 4 query heads")
    assert [own.keeps_ratio for own in checks] == [True, False, True]


def test_fewer_kv_heads_than_planned_in_every_layer_are_marked(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model("llama", kv_heads=1, ratio=6)
    gqaprune.save(model, tokenizer, tmp_path / "out")
    keep_everything(make_model("llama")).save(tmp_path / "out/plan.json")  # 6Q:2KV
    assert [own.keeps_ratio for own in check(tmp_path / "out")] == [False] * 3


def test_a_plan_of_another_number_of_layers_is_refused(pruned_folder: Path) -> None:
    keep_everything(make_model("qwen2", layers=2)).save(pruned_folder / "plan.json")
    with pytest.raises(ValueError, match=r"plan\.json has 2 layers, but config\.json has 3"):
        check(pruned_folder)


def test_tensors_that_no_file_holds_are_named_in_their_layer_and_outside_of_the_layers(pruned_folder: Path) -> None:
    file = pruned_folder / "model.safetensors"
    tensors = load_file(file)
    sound = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name and "embed" not in name}
    save_file(sound, file, {"format": "pt"})
    wrong = find_wrong_tensors(pruned_folder, load_config(pruned_folder))
    assert wrong == {
        None: ["model.embed_tokens.weight is missing (1 in all)"],
        1: ["model.layers.1.self_attn.q_proj.weight is missing (12 in all)"],
    }
    file.unlink()
    assert set(find_wrong_tensors(pruned_folder, load_config(pruned_folder))) == {None, 0, 1, 2}


def test_no_tensor_of_a_sound_checkpoint_is_missed(any_variant: str, tmp_path: Path) -> None:
    model = make_model(any_variant)
    model.save_pretrained(tmp_path)
    assert find_wrong_tensors(tmp_path, model.config) == {}


def test_a_model_saved_without_its_head_is_whole_if_that_is_tied(tmp_path: Path) -> None:
    model = make_model("qwen2-tied")
    model.model.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    assert "layers.1.mlp.up_proj.weight" in load_file(tmp_path / "model.safetensors")
    assert find_wrong_tensors(tmp_path, model.config) == {}
    loaded, ids = gqaprune.load_model(tmp_path), torch.arange(8)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", None])
def test_broken_weights_are_said_in_a_sentence(content: bytes | None, pruned_folder: Path) -> None:
    file = pruned_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-200] if content is None else content)
    with pytest.raises(ValueError, match="model.safetensors is missing, broken or truncated"):
        inspect(str(pruned_folder))


def test_a_broken_index_and_what_it_names_in_vain_are_said_in_a_sentence(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path, max_shard_size="10KB")
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"safetensors is missing, broken or truncated \(No such file"):
        inspect(str(tmp_path))
    for text in ("{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', "[" * 10**5):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(ValueError, match=r"not say which file holds which tensor|index\.json is not a safeten"):
            inspect(str(tmp_path))


def test_padded_checkpoint_keeps_the_ratio_of_its_plan(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = make_model("llama")
    plan = make_plan(model, [[0, 1], [0], [1]], [list(range(20)), [0, 1], [3]])
    apply_plan(model, plan)
    gqaprune.save(model, tokenizer, tmp_path / "padded", plan, format="padded")
    assert all(own.keeps_ratio and not own.wrong_tensors for own in check(tmp_path / "padded"))


def test_the_reachable_rates_are_those_that_pruning_reaches(any_variant: str) -> None:
    model = make_model(any_variant)
    dense = sum(count_layer_parameters(model))
    found = {own.kind: own for own in measure_reach(model)}
    split = {("attention",): "10:0", ("mlp",): "0:10"}.get(tuple(found), "free")
    whole: dict[str, Any] = {"limits": {"attention_layers": (0, 3), "mlp_layers": (0, 3)}, "split": split}
    rate = sum(own.reachable_anywhere for own in found.values())
    config = PruningConfig(rate=rate, criterion="l1", repair={"method": "none"}, allocation="global", **whole)
    prune(model, [], config)
    assert 1 - sum(count_layer_parameters(model)) / dense == pytest.approx(
        rate, abs=max(own.of_decoder for own in found.values())
    )
    geometry = read_geometry(model.config)
    assert all(geometry.kv_heads[layer] == 1 for layer in range(3)) or "attention" not in found


def test_the_finest_step_is_said_in_shares(capsys: pytest.CaptureFixture[str]) -> None:
    attention, mlp = measure_reach(make_model("llama", kv_heads=4, ratio=7))
    layer = count_layer_parameters(make_model("llama", kv_heads=4, ratio=7))[0]
    assert attention.of_block == 0.25 and attention.of_layer == attention.unit_parameters / layer
    assert attention.describe_step().startswith(f"one GQA group ({attention.unit_parameters:,} parameters) is 25.0% of")
    assert mlp.describe_step().startswith(f"one MLP channel ({3 * 112} parameters) is 5.0% of a layer's MLP")


def test_risks_name_what_the_model_has_and_nothing_else() -> None:
    def list_of(dtype: str = "float32", outliers: Any = None, variant: str = "llama", **shape: int) -> list[str]:
        config = make_model(variant, **shape).config  # type: ignore[arg-type]
        config.dtype = torch.bfloat16
        return list_risks(config, read_geometry(config), 0.25, dtype, outliers)

    assert list_of(kv_heads=8, ratio=1) == []
    assert [risk.split(":")[0] for risk in list_of(kv_heads=4, ratio=7)] == ["few KV heads"]
    assert "only one KV head" in list_of(kv_heads=1)[0]
    assert "trained in bfloat16" in list_of("float16", kv_heads=8, ratio=1)[0]
    massive = list_of(outliers={BlockKey(1, "mlp"): {7: 2687.0, 3: 25.0}}, kv_heads=8, ratio=1)
    assert "2 units" in massive[0] and "2,687 times in layer 1 mlp unit 7" in massive[0]
    assert "share their weights, 25%" in list_of(variant="qwen2-tied", kv_heads=8, ratio=1)[0]
    assert list_of(variant="mixtral")[0].endswith("so steps are coarse; set pruning.granularity to query")
    assert "channels" not in list_of(variant="mixtral", kv_heads=1)[0]
    assert list_of(variant="olmo2")[0].startswith("attention stays whole")


def test_the_written_configuration_of_qwen_takes_mlps_first_and_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "qwen"
    Qwen2Config(
        hidden_size=3584,
        intermediate_size=18944,
        num_attention_heads=28,
        num_key_value_heads=4,
        num_hidden_layers=28,
        max_position_embeddings=32768,
        dtype="bfloat16",
    ).save_pretrained(model)
    inspect(str(model), write_config=str(tmp_path / "qwen.yaml"))
    text = (tmp_path / "qwen.yaml").read_text()
    settings = yaml.safe_load(text)
    assert settings["model"]["dtype"] == "bfloat16"
    assert "split" not in settings["pruning"] and settings["pruning"]["limits"]["mlp_layers"] == [4, 26]
    assert "attention_layers" not in settings["pruning"]["limits"] and "# attention_layers: [10, 24]" in text
    assert text.index("split:") < text.index("# attention_layers") and "one of 4 KV heads is 25%" in text
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["gqaprune", "fit", "--config", str(tmp_path / "qwen.yaml"), "--print_config"])
    with pytest.raises(SystemExit) as stop:
        main_or_exit()
    assert stop.value.code == 0
    assert yaml.safe_load(capsys.readouterr().out)["pruning"]["rate"] == settings["pruning"]["rate"]


@pytest.mark.parametrize("variant", ["llama", *WHOLE_ATTENTION, *WHOLE_MLP])
@pytest.mark.parametrize("shape", [{}, {"layers": 32, "kv_heads": 4}, {"layers": 32, "kv_heads": 8}])
def test_the_written_configuration_can_be_pruned_with(variant: str, shape: Any, tmp_path: Path) -> None:
    model = make_model(variant, **shape)
    geometry = read_geometry(model.config)
    model.config.save_pretrained(tmp_path)
    inspect(str(tmp_path), write_config=str(tmp_path / "own.yaml"))
    settings = yaml.safe_load((tmp_path / "own.yaml").read_text())["pruning"]
    del settings["scheduling"]
    plain = {"criterion": "l1", "damage": "scores", "repair": {"method": "none"}}
    prune(model, [], PruningConfig(**settings, **plain))
    pruned = read_geometry(model.config)
    assert (pruned.kv_heads != geometry.kv_heads) == (variant in WHOLE_MLP)
    assert pruned != geometry


@pytest.mark.parametrize("name", ["my #1 llama", "123", "a: b", "@x", 'the "best"', "null"])
def test_any_folder_name_is_read_back_from_the_written_configuration(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_model("llama").config.save_pretrained(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    inspect(name, write_config="own.yaml")
    assert yaml.safe_load(Path("own.yaml").read_text())["model"]["pretrained"] == name


def main_or_exit() -> None:
    raise SystemExit(main())


def test_inspect_prints_layers_risks_and_steps(pruned_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(str(pruned_folder))
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("✅") == 6 and "compared with the base" in printed and "one GQA group" in printed
    assert "risk: layers differ in shape" in printed
    inspect(str(pruned_folder), json=True)
    facts = json.loads(capsys.readouterr().out)
    assert [own["keeps_ratio"] for own in facts["layer_checks"]] == [True] * 3 and facts["wrong_outside"] == []
    assert facts["reach"][0]["kind"] == "attention"


def test_outliers_are_looked_for_where_they_are_asked_for(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gqaprune.scoring.outliers.OUTLIER_RATIO", 1.5)
    inspect(str(tiny_folder), outliers=True)
    assert "massive activations:" in capsys.readouterr().out


def test_a_model_with_code_of_its_own_is_inspected_where_that_is_trusted(tiny_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folder, tmp_path / "remote")
    (folder / "modeling_own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n\n\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own"}
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    inspect(str(folder), outliers=True, trust_remote_code=True)
