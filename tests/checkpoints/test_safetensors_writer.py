"""What a folder's config says of code is what the folder has: own code with its map, or neither."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gqaprune.checkpoints.save import save
from gqaprune.models.loading import load, load_model
from gqaprune.models.tokenizer import load_tokenizer
from gqaprune.placement.loading_by_layer import load_offloaded_model
from gqaprune.surgery.cut import apply_plan

from command import Run
from cuts import EVEN, UNEVEN, get_logits, make_plan, make_pruned, read_names
from tiny import make_model, make_tokenizer

CODE = {
    "configuration_own.py": "from transformers import LlamaConfig\n\nfrom .settings_own import TYPE\n\n\n"
    "class OwnConfig(LlamaConfig):\n    model_type = TYPE\n",
    "settings_own.py": 'TYPE = "own"\n',
    "modeling_own.py": "from transformers import LlamaForCausalLM\n\nfrom .configuration_own import OwnConfig\n\n\n"
    "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n",
    "tokenization_own.py": "from transformers import PreTrainedTokenizerFast\n\n\n"
    "class OwnTokenizerFast(PreTrainedTokenizerFast):\n    pass\n",
}
MODEL_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
TOKENIZER_MAP = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizerFast"]}


def edit(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def read_map(file: Path) -> Any:
    return json.loads(file.read_text()).get("auto_map")


def write_own(folder: Path) -> Path:
    """A dense model and tokenizer with code of their own, which is Llama's under another name."""
    make_model("llama", kv_heads=3, ratio=2).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    for name, source in CODE.items():
        (folder / name).write_text(source)
    lost = {"AutoModelForSequenceClassification": "modeling_lost.OwnForSequenceClassification"}
    edit(folder / "config.json", model_type="own", architectures=["OwnForCausalLM"], auto_map={**MODEL_MAP, **lost})
    edit(folder / "tokenizer_config.json", tokenizer_class="OwnTokenizerFast", auto_map=TOKENIZER_MAP)
    return folder


@pytest.mark.parametrize("format", ["stock", "per-layer", "padded"])
def test_a_class_of_transformers_is_written_without_the_map_of_its_source(format: str, tmp_path: Path) -> None:
    dense = make_model("phi3", kv_heads=3, ratio=2)
    dense.save_pretrained(tmp_path / "dense")
    make_tokenizer().save_pretrained(tmp_path / "dense")
    code = {"AutoConfig": "configuration_phi3.Phi3Config", "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"}
    edit(tmp_path / "dense/config.json", auto_map=code)
    edit(tmp_path / "dense/tokenizer_config.json", auto_map=TOKENIZER_MAP)
    model, tokenizer = load(tmp_path / "dense")
    apply_plan(model, make_plan(model, *(EVEN if format == "stock" else UNEVEN)))
    assert save(model, tokenizer, tmp_path / "out", format="auto" if format != "padded" else format) == format
    own = {"modeling_pruned"} if format == "per-layer" else set()
    code = read_map(tmp_path / "out/config.json") or {}
    assert {place.split(".")[0] for place in code.values()} == own and read_map(
        tmp_path / "out/tokenizer_config.json"
    ) is None
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    torch.testing.assert_close(get_logits(plain), get_logits(model), atol=1e-4, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True)("abc")["input_ids"]


def test_a_model_loaded_in_python_is_written_without_a_map_either(tmp_path: Path) -> None:
    model = make_pruned("llama", UNEVEN)
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_lost.LostForCausalLM"}
    assert save(model, None, tmp_path / "out") == "per-layer"
    apply_plan(model, make_plan(model, [[0]] * 3, [[0, 1]] * 3))
    model.config.auto_map = {"AutoModelForCausalLM": "modeling_lost.LostForCausalLM"}
    assert save(model, None, tmp_path / "even") == "stock"
    assert read_map(tmp_path / "even/config.json") is None


@pytest.mark.parametrize("kept", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("is_offloaded", [False, True], ids=["whole", "offloaded"])
def test_own_code_is_written_with_its_map(
    kept: tuple[list[list[int]], list[list[int]]], is_offloaded: bool, tmp_path: Path
) -> None:
    dense = write_own(tmp_path / "dense")
    whole = load_model(dense, trust_remote_code=True)
    apply_plan(whole, make_plan(whole, *kept))
    model = load_offloaded_model(dense, tmp_path / "work", trust_remote_code=True) if is_offloaded else whole
    if is_offloaded:
        apply_plan(model, make_plan(model, *kept))
    tokenizer = load_tokenizer(dense, trust_remote_code=True)
    if is_offloaded and kept is UNEVEN:
        with pytest.raises(ValueError, match="OwnConfig comes with its own code: .* but pruning.offload"):
            save(model, tokenizer, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    assert save(model, tokenizer, tmp_path / "out") == ("stock" if kept is EVEN else "padded")
    assert read_names(tmp_path / "out") >= CODE.keys()
    assert read_map(tmp_path / "out/config.json") == MODEL_MAP
    assert read_map(tmp_path / "out/tokenizer_config.json") == TOKENIZER_MAP
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(plain).__name__ == "OwnForCausalLM"
    torch.testing.assert_close(get_logits(plain), get_logits(whole), atol=1e-4, rtol=0)


def test_a_class_of_its_own_over_a_config_of_transformers_is_kept(tmp_path: Path) -> None:
    dense = write_own(tmp_path / "dense")
    code = {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (dense / "modeling_own.py").write_text(
        CODE["modeling_own.py"].replace("    config_class = OwnConfig\n", "    pass\n")
    )
    edit(dense / "config.json", model_type="llama", auto_map=code)
    model = load_model(dense, trust_remote_code=True)
    apply_plan(model, make_plan(model, *UNEVEN))
    assert save(model, None, tmp_path / "out") == "padded"
    assert read_map(tmp_path / "out/config.json") == code
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(plain).__name__ == "OwnForCausalLM"
    torch.testing.assert_close(get_logits(plain), get_logits(model), atol=1e-4, rtol=0)


def test_own_code_whose_layers_would_differ_is_refused_before_work_that_goes_by_layer(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = write_own(tmp_path / "dense")
    source = ("--model.pretrained", str(dense), "--model.trust_remote_code", "true", "--pruning.offload", "true")
    assert run("prune", *source, "--export.folder", "out") == 1
    assert "OwnConfig comes with its own code: only format padded can store" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["per-layer", "padded", "stock"])
def test_code_of_an_earlier_checkpoint_is_written_as_the_new_one_needs_it(format: str, tmp_path: Path) -> None:
    save(make_pruned("llama", UNEVEN), None, tmp_path / "first")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "first", trust_remote_code=True)
    if format == "stock":
        apply_plan(plain, make_plan(plain, [[0]] * 3, [[0, 1]] * 3))
    assert save(plain, None, tmp_path / "out", format=format) == format
    assert ("modeling_pruned.py" in read_names(tmp_path / "out")) is (format == "per-layer")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    torch.testing.assert_close(get_logits(again), get_logits(plain), atol=1e-4, rtol=0)


def test_a_name_in_a_gguf_file_is_not_written_into_other_formats(tmp_path: Path) -> None:
    save(make_model("llama"), make_tokenizer([("e", "d")]), tmp_path / "gguf", format="gguf-f16")
    save(load_model(tmp_path / "gguf"), None, tmp_path / "out")
    assert not [
        name for name in json.loads((tmp_path / "out/config.json").read_text()) if name.endswith("name_or_path")
    ]


def test_weights_that_are_not_quantised_any_more_are_not_said_to_be(tmp_path: Path) -> None:
    model = make_model("llama")
    model.config.quantization_config = {"quant_method": "fp8"}  # of the files that a user has dequantised by hand
    save(model, None, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert torch.equal(get_logits(load_model(tmp_path / "out")), get_logits(model))
