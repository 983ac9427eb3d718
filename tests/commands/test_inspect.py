"""What `gqaprune inspect` prints is what the model holds and needs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

import gqaprune
from gqaprune.cli import main
from gqaprune.commands.bos_check import BosCheck
from gqaprune.commands.inspect import inspect
from gqaprune.data.corpora import Corpus
from gqaprune.data.windows import cut_windows, make_batches, tokenize_corpus
from gqaprune.evaluation.perplexity import measure_perplexity
from gqaprune.planning.memory import GIB, estimate_memory, read_sizes
from gqaprune.surgery.cut import apply_plan

from cuts import make_plan
from tiny import make_model, make_tokenizer


def read(model: Path | str, capsys: pytest.CaptureFixture[str], **settings: object) -> dict[str, object]:
    capsys.readouterr()
    inspect(str(model), json=True, **settings)  # type: ignore[arg-type]
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_pruned_checkpoint_is_inspected_layer_by_layer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model("qwen2")
    plan = make_plan(model, [[0, 1], [0], [1]], [list(range(20)), [0, 1], [3]])
    apply_plan(model, plan)
    gqaprune.save(model, tokenizer, tmp_path / "pruned", plan)
    found = read(tmp_path / "pruned", capsys)
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert (found["kv_head_range"], found["channel_range"], found["ratio_range"]) == ([1, 2], [1, 20], [3, 3])
    assert found["kv_cache_bytes_per_token"] == 2 * 4 * 8 * 4


@pytest.mark.parametrize("is_own", [True, False])
def test_a_head_of_its_own_is_counted_whatever_the_config_says(
    is_own: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_model("qwen2-tied")
    tied = sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = torch.randn_like(embedding) if is_own else embedding.clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    found = read(tmp_path, capsys)
    assert found["parameters"] == tied + is_own * embedding.numel()
    assert any("share their weights" in risk for risk in found["risks"]) is not is_own  # type: ignore[attr-defined]


def test_embedded_gguf_is_inspected_without_loading_weights(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    found = read("smollm2-135m", capsys)
    assert found["parameters"] == 134_515_008 and found["kv_cache_bytes_per_token"] == 46_080
    assert found["weight_bytes"] == {"float32": 538_060_032, "bfloat16": 269_030_016, "float16": 269_030_016}


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["gqaprune", "inspect", *arguments])
    return main()


def test_command_prints_tables_and_the_same_as_json(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_main(monkeypatch, str(tiny_folder), "--devices", "4") == 0
    shown = capsys.readouterr().out
    assert "KV-cache bytes/token" in shown and "fsdp, 4" in shown and "recovery, distill" in shown
    found = read(tiny_folder, capsys, devices=4)
    assert "recomputed" not in shown
    memory, stages = found["memory_gib"], found["stages"]
    assert isinstance(memory, dict) and isinstance(stages, list)
    assert "forward passes" in shown and all(stage["name"] in " ".join(shown.split()) for stage in stages)
    assert {stage["name"]: stage["passes"] for stage in stages}["predictions of the dense model"] == pytest.approx(1)
    sizes = estimate_memory(read_sizes(make_model(channels=32).config), 4, 4, 2048, 65536)
    assert memory["repair"]["ddp"] == pytest.approx(sizes["repair"]["ddp"] / GIB)  # type: ignore[operator]
    assert run_main(monkeypatch, str(tiny_folder), "--gradient_checkpointing", "true") == 0
    assert "activations recomputed" in capsys.readouterr().out
    memory = read(tiny_folder, capsys, devices=4, gradient_checkpointing=True)["memory_gib"]
    assert isinstance(memory, dict)
    sizes = estimate_memory(read_sizes(make_model(channels=32).config), 4, 4, 2048, 65536, True)
    assert memory["scoring"]["ddp"] == pytest.approx(sizes["scoring"]["ddp"] / GIB)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("/no/such/model",), "no model at /no/such/model"),
        (("smollm2-135m", "--devices", "0"), "devices must be at least 1, got 0"),
        (("smollm2-135m", "--dtype", "int3"), "dtype must be one of float32"),
    ],
)
def test_what_cannot_be_inspected_gets_a_sentence(
    arguments: tuple[str, ...], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_main(monkeypatch, *arguments) == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(("variant", "adds_bos"), [("llama", False), ("gemma2", True)])
def test_a_tokenizer_that_agrees_with_the_windows_about_bos_needs_no_weights(
    variant: str, adds_bos: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    gqaprune.save(make_model(variant), make_tokenizer(adds_bos=adds_bos), tmp_path)
    monkeypatch.setattr("gqaprune.commands.bos_check.load", lambda *_, **__: pytest.fail("loaded"))
    assert read(tmp_path, capsys)["bos"] is None


@pytest.mark.parametrize(("variant", "adds_bos"), [("llama", True), ("gemma2", False)])
def test_a_few_windows_are_measured_with_and_without_bos_where_tokenizer_and_windows_differ(
    variant: str, adds_bos: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gqaprune.save(make_model(variant), make_tokenizer(adds_bos=adds_bos), tmp_path)
    found = read(tmp_path, capsys)["bos"]
    model, tokenizer = gqaprune.load(tmp_path)
    tokens = tokenize_corpus(tokenizer, Corpus("embedded", "validation"), 3 * 256)
    expected = [
        measure_perplexity(model, {"text": make_batches(*cut_windows(tokens, 256, bos=bos), 1)})["text"]
        for bos in (256, None)
    ]
    assert [found["with_bos"], found["without_bos"]] == expected  # type: ignore[index]
    assert found["begins_windows"] is (variant == "gemma2")  # type: ignore[index]


def test_bos_that_changes_perplexity_by_more_than_half_is_a_risk_with_the_setting_to_change() -> None:
    helps = BosCheck(False, with_bos=21.3, without_bos=65.4)
    assert helps.matters and helps.describe() == (
        "the tokenizer adds BOS to texts, but windows do not begin with it: perplexity is 21.3 with it and 65.4 "
        "without; set data.bos to true"
    )
    harms = BosCheck(True, with_bos=65.4, without_bos=21.3)
    assert harms.matters and harms.describe().endswith("; set data.bos to false")
    assert not BosCheck(False, with_bos=10.0, without_bos=15.0).matters
    assert BosCheck(False, with_bos=10.0, without_bos=15.1).matters
    assert not BosCheck(False, reason="too large").matters


def test_a_model_too_large_to_load_for_it_is_not_measured_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gqaprune.commands.bos_check.MEASURED_PARAMETERS", 100)
    gqaprune.save(make_model(), make_tokenizer(adds_bos=True), tmp_path)
    found = read(tmp_path, capsys)["bos"]
    assert found["with_bos"] is None and "more than 100 parameters" in found["reason"]  # type: ignore[index]
    inspect(str(tmp_path))
    assert "is not measured: the model has more than 100 parameters" in " ".join(capsys.readouterr().out.split())
