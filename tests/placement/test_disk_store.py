"""A model whose decoder layers stay on disk is pruned to the same bits, one of them in memory at a time."""

import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import gqaprune.models.loading
import gqaprune.placement.disk_store
from gqaprune import PruningConfig, PruningPlan, apply_plan, load_model, load_offloaded_model, save
from gqaprune.common.stage_cache import StageCache
from gqaprune.evaluation.perplexity import measure_perplexity
from gqaprune.models.architecture import get_layers
from gqaprune.models.sources import find_tensors, load_config
from gqaprune.pipeline import prune
from gqaprune.placement.disk_store import DiskStore
from gqaprune.placement.layer_store import MemoryStore, find_store
from gqaprune.placement.model_hash import hash_model
from gqaprune.reporting.report import Report

from tiny import VARIANTS, WHOLE_ATTENTION, make_model, make_tokenizer, make_tokens, make_unknown

BATCHES = [make_tokens(2, 24, seed=seed) for seed in range(6)]
TEXT = {"held": [{"input_ids": make_tokens(2, 24, seed=9), "labels": make_tokens(2, 24, seed=9)}] * 2}
CONFIG: dict[str, Any] = {
    "rate": 0.3,
    "criterion": "obs",
    "allocation": "global",
    "split": "free",
    "limits": {"attention_layers": (0, 3), "mlp_layers": (0, 3)},
    "repair": {"epochs": 2, "distill_tokens": 0},
}
PLAIN = [name for name in VARIANTS if name != "qwen2_moe"]
"""Variants without experts."""


def write_dense(folder: Path, variant: str = "llama", **settings: Any) -> Path:
    model = make_model(variant, kv_heads=4)
    model.generation_config.max_new_tokens = 7
    model.save_pretrained(folder / "dense", **settings)
    return folder / "dense"


def open_dense(folder: Path, dtype: str = "auto") -> PreTrainedModel:
    return load_offloaded_model(folder / "dense", folder / "work", dtype)


def run(model: PreTrainedModel, **settings: Any) -> tuple[PruningPlan, Report]:
    return prune(model, BATCHES, PruningConfig(**{**CONFIG, **settings}), evaluation=TEXT)


def read_weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in find_store(model).named_parameters()}


def assert_same(model: PreTrainedModel, offloaded: PreTrainedModel) -> None:
    weights, others = read_weights(model), read_weights(offloaded)
    assert list(weights) == list(others)
    assert [name for name in weights if not torch.equal(weights[name], others[name])] == []


def count_held(model: PreTrainedModel) -> int:
    return sum(not parameter.is_meta for layer in get_layers(model) for parameter in layer.parameters())


@contextmanager
def watch_reads() -> Iterator[list[str]]:
    """Names of the parameters that are read, one entry for each layer."""
    reads: list[str] = []
    read = gqaprune.placement.disk_store._read_parameters

    def record(model: PreTrainedModel, files: Any, wanted: Any) -> None:
        read(model, files, wanted)
        reads.append(next(iter(wanted)))
        inside = {name for name, _ in get_layers(model).named_parameters(prefix="model.layers")}
        held = {name for name in inside if not model.get_parameter(name).is_meta}
        assert held == inside & wanted.keys()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gqaprune.placement.disk_store, "_read_parameters", record)
        yield reads


@pytest.mark.parametrize("variant", PLAIN)
def test_plan_report_and_every_bit_are_those_of_a_run_in_memory(variant: str, tmp_path: Path) -> None:
    dense = write_dense(tmp_path, variant)
    model, offloaded = load_model(dense), open_dense(tmp_path)
    assert_same(model, offloaded)
    plan, report = run(model)
    assert not plan.removes_nothing
    assert run(offloaded) == (plan, report)
    assert_same(model, offloaded)


@pytest.mark.parametrize("variant", WHOLE_ATTENTION)
def test_mlps_alone_are_pruned_as_in_memory(variant: str, tmp_path: Path) -> None:
    model, offloaded = load_model(write_dense(tmp_path, variant)), open_dense(tmp_path)
    settings = {"rate": 0.1, "split": None, "limits": {"attention_layers": None}}
    assert run(offloaded, **settings) == run(model, **settings)
    assert_same(model, offloaded)


@pytest.mark.parametrize(
    "settings",
    [
        {"criterion": "wanda+wifv", "allocation": "uniform", "split": "2:8"},
        {"criterion": "l1+l2", "allocation": "optimal"},
        {"criterion": "random", "repair": {"method": "none"}},
        {
            "repair": {"pull": 0.0, "everywhere": False, "distill_tokens": 0},
            "limits": {"mlp_layers": (1, 2), "attention_layers": (1, 2)},
            "rate": 0.1,
        },
        {"steps": 2},
        {"granularity": "query", "rate": 0.1},
        {"rate": 0.0, "kv_rate": 0.25},
        {"rate": 0.0},
    ],
    ids=lambda settings: " ".join(map(str, settings.values())),
)
def test_whatever_goes_layer_by_layer_is_the_same_as_in_memory(settings: dict[str, Any], tmp_path: Path) -> None:
    model, offloaded = load_model(write_dense(tmp_path)), open_dense(tmp_path)
    assert run(offloaded, **settings) == run(model, **settings)
    assert_same(model, offloaded)


def test_a_llama_in_all_but_name_is_checked_and_pruned_as_in_memory(tmp_path: Path) -> None:
    make_unknown("seed_oss").save_pretrained(tmp_path / "dense")
    model, offloaded = load_model(tmp_path / "dense"), open_dense(tmp_path)
    assert run(offloaded) == run(model)
    assert_same(model, offloaded)
    make_unknown("diffllama").save_pretrained(tmp_path / "other" / "dense")
    with pytest.raises(ValueError, match="cannot be pruned yet: layer 0 has a parameter"):
        run(open_dense(tmp_path / "other"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_layers_get_the_type_that_is_asked_for(dtype: str, tmp_path: Path) -> None:
    model, offloaded = load_model(write_dense(tmp_path), dtype), open_dense(tmp_path, dtype)
    assert offloaded.dtype == model.dtype == getattr(torch, dtype)
    assert run(offloaded) == run(model)
    assert_same(model, offloaded)


def test_a_sharded_model_is_read_and_a_pruned_one_pruned_on(tmp_path: Path) -> None:
    write_dense(tmp_path, max_shard_size="20KB")
    assert len(set(find_tensors(tmp_path / "dense").values())) > 3
    first = open_dense(tmp_path)
    save(first, None, tmp_path / "first", run(first)[0])
    again = load_offloaded_model(tmp_path / "first", tmp_path / "work")
    model = load_model(tmp_path / "first")
    settings = {"rate": 0.1}
    assert run(again, **settings) == run(model, **settings)
    assert_same(model, again)


@pytest.mark.parametrize(("allocation", "format"), [("global", "per-layer"), ("uniform", "stock")])
@pytest.mark.parametrize("variant", ["llama", "qwen2", "qwen2-tied", "mistral"])
def test_what_is_written_is_what_a_run_in_memory_writes(
    variant: str, allocation: str, format: str, tmp_path: Path
) -> None:
    model, offloaded = load_model(write_dense(tmp_path, variant)), open_dense(tmp_path)
    for name, each in (("whole", model), ("offloaded", offloaded)):
        plan, _ = run(each, allocation=allocation, split=None, rate=0.1)
        (tmp_path / name).mkdir()
        assert save(each, make_tokenizer(), tmp_path / name / "pruned", plan) == format
    whole, other = tmp_path / "whole" / "pruned", tmp_path / "offloaded" / "pruned"
    for file in whole.iterdir():
        assert file.suffix == ".safetensors" or file.read_bytes() == (other / file.name).read_bytes(), file.name
    files = find_tensors(other)
    assert len(set(files.values())) == 4  # three layers, and what is outside of them
    tensors = load_file(whole / "model.safetensors")
    assert files.keys() == tensors.keys()
    assert all(torch.equal(load_file(path)[name], tensors[name]) for name, path in files.items())
    index = json.loads((other / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    tokens = make_tokens()
    with torch.no_grad():
        logits = model(tokens).logits
        for loaded in (load_model(other), AutoModelForCausalLM.from_pretrained(other, trust_remote_code=True)):
            assert torch.equal(loaded.eval()(tokens).logits, logits)


def test_one_layer_is_in_memory_at_a_time_and_none_afterwards(tmp_path: Path) -> None:
    write_dense(tmp_path)
    with watch_reads() as reads:
        model = open_dense(tmp_path)
        plan, _ = run(model, criterion="obs+l2", steps=2)
        save(model, None, tmp_path / "pruned", plan)
    assert len(reads) > 20
    assert count_held(model) == 0


def test_all_batches_of_a_corpus_pass_a_layer_that_is_read_once(tmp_path: Path) -> None:
    write_dense(tmp_path)
    model = open_dense(tmp_path)
    with watch_reads() as reads:
        measure_perplexity(model, {"one": TEXT["held"], "two": TEXT["held"]})
    layers = [f"model.layers.{index}.self_attn.q_proj.weight" for index in range(3)]
    assert reads == 2 * layers


def test_the_dense_files_stay_and_layers_that_changed_go_with_the_model(tmp_path: Path) -> None:
    file = write_dense(tmp_path) / "model.safetensors"
    before = file.read_bytes()
    model = open_dense(tmp_path)
    run(model, limits={"mlp_layers": (1, 3), "attention_layers": (1, 3)})
    (folder,) = tmp_path.glob(".work.*")
    assert {path.name for path in folder.glob("layer-*")} == {"layer-1.safetensors", "layer-2.safetensors"}
    assert file.read_bytes() == before
    del model
    gc.collect()
    assert not folder.exists()


def test_a_layer_is_let_go_as_it_was_unless_it_is_said_to_change(tmp_path: Path) -> None:
    model = load_offloaded_model(write_dense(tmp_path), tmp_path / "work")
    weight = "model.layers.1.mlp.up_proj.weight"
    before = read_weights(model)[weight]
    for changes in (False, True):
        with find_store(model).hold(1, changes), torch.no_grad():
            model.get_parameter(weight).zero_()
        assert read_weights(model)[weight].any() == (not changes)
    with pytest.raises(RuntimeError, match="stopped"), find_store(model).hold(0, changes=True), torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight").zero_()
        raise RuntimeError("stopped")
    assert read_weights(model)["model.layers.0.mlp.up_proj.weight"].any()
    assert before.any()
    assert count_held(model) == 0


def test_a_plan_is_applied_layer_by_layer(tmp_path: Path) -> None:
    model, offloaded = load_model(write_dense(tmp_path)), open_dense(tmp_path)
    plan, _ = run(load_model(tmp_path / "dense"))
    with watch_reads():
        apply_plan(offloaded, plan)
    apply_plan(model, plan)
    assert_same(model, offloaded)


def test_a_stopped_run_in_memory_goes_on_layer_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_dense(tmp_path)
    model = load_model(tmp_path / "dense")
    offloaded = open_dense(tmp_path)
    assert hash_model(model) == hash_model(offloaded)
    names = [name for name, _ in find_store(offloaded).named_parameters()]
    assert names == list(dict(model.named_parameters()))
    config, stages = PruningConfig(**CONFIG), StageCache(tmp_path / "stages")
    expected = prune(model, BATCHES, config, evaluation=TEXT, stages=stages)
    monkeypatch.setattr("gqaprune.surgery.repair.refit_block", None)  # nothing is left to refit
    offloaded = open_dense(tmp_path)
    assert prune(offloaded, BATCHES, config, evaluation=TEXT, stages=stages) == expected
    assert_same(model, offloaded)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"criterion": "fisher+obs"}, r"criterion fisher\+obs .* l1, l2, wanda, wifv, obs, random"),
        ({"criterion": "param_first"}, "criterion param_first"),
        ({"allocation": "inverse"}, "allocation inverse .* uniform, global or optimal"),
        ({"limits": {"frozen_layers": 1}}, "frozen_layers 1 .* to 0"),
        ({"allocation": "optimal", "damage": "gated"}, "damage gated .* to repaired"),
        ({"swaps": {"generations": 2}}, "swaps.generations 2 .* to 0"),
        ({"repair": {"method": "bias"}}, "repair.method bias .* least_squares"),
        ({"repair": {"bias": True}}, "repair.bias True .* false"),
    ],
)
def test_what_needs_the_whole_model_is_refused_with_what_does_not(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = load_offloaded_model(write_dense(tmp_path), tmp_path / "work")
    with pytest.raises(ValueError, match=message):
        run(model, **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "padded"}, "format padded .* gqaprune export --format padded"),
        ({"format": "gguf-f16"}, "format gguf-f16 .* stock or per-layer"),
        ({"quantization": "int8"}, "quantization int8 .* null"),
    ],
)
def test_formats_that_need_the_whole_model_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = load_offloaded_model(write_dense(tmp_path), tmp_path / "work")
    with pytest.raises(ValueError, match=message):
        save(model, make_tokenizer(), tmp_path / "pruned", **settings)
    assert not (tmp_path / "pruned").exists()


def test_a_folder_of_the_model_without_its_head_is_read_as_in_memory(tmp_path: Path) -> None:
    make_model("qwen2-tied", kv_heads=4).model.save_pretrained(tmp_path / "dense", max_shard_size="20KB")
    assert "layers.0.mlp.up_proj.weight" in find_tensors(tmp_path / "dense")
    model, offloaded = load_model(tmp_path / "dense"), open_dense(tmp_path)
    assert_same(model, offloaded)
    assert run(offloaded) == run(model)
    assert_same(model, offloaded)
    save(offloaded, None, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    with torch.no_grad():
        assert torch.equal(plain(BATCHES[0]).logits, model(BATCHES[0]).logits)


@pytest.mark.parametrize(
    ("prefix", "message"),
    [
        ("", r"its files lack lm_head\.weight \(1 in all\), which the config needs$"),
        (
            "base_model.model.model.",
            r"lack lm_head\.weight \(30 in all\), .*; they have base_model\.model\.model\.e",
        ),
        ("_orig_mod.model.", r"lack lm_head\.weight \(30 in all\), .*; they have _orig_mod\.model\.embed"),
    ],
)
def test_names_of_another_model_are_refused_as_in_memory(prefix: str, message: str, tmp_path: Path) -> None:
    model = make_model("llama", kv_heads=4)
    model.save_pretrained(tmp_path / "dense")
    tensors = {f"{prefix}{name}": tensor for name, tensor in model.model.state_dict().items()}
    save_file(tensors, tmp_path / "dense/model.safetensors", {"format": "pt"})
    for load in (lambda: load_model(tmp_path / "dense"), lambda: open_dense(tmp_path)):
        with pytest.raises(ValueError, match=message):
            load()


@pytest.mark.parametrize("what", ["experts", "gguf", "pickle", "missing", "shape", "quantised", "type"])
def test_files_that_layers_cannot_be_read_from_are_refused(what: str, tmp_path: Path) -> None:
    folder = write_dense(tmp_path, "qwen2_moe" if what == "experts" else "llama")
    file, config, source, dtype = folder / "model.safetensors", folder / "config.json", folder, "auto"
    settings, tensors = json.loads(config.read_text()), load_file(file)
    weight = "model.layers.1.mlp.up_proj.weight"
    message = {
        "experts": "experts have other names or shapes in files",
        "gguf": "is a GGUF file: .* gqaprune export --format stock",
        "pickle": "neither model.safetensors nor model.safetensors.index.json",
        "missing": rf"lack {weight} \(1 in all\)",
        "shape": rf"{weight} has shape \[3, 4\] in model.safetensors, but the config says \[20, 48\]",
        "quantised": "quantised weights have other names .* unquantised",
        "type": "dtype must be one of",
    }[what]
    if what == "gguf":
        source = tmp_path / "model.gguf"
        source.touch()
    elif what == "pickle":
        torch.save(tensors, folder / "pytorch_model.bin")
        file.unlink()
    elif what == "missing":
        del tensors[weight]
        save_file(tensors, file)
    elif what == "shape":
        save_file({**tensors, weight: torch.ones(3, 4)}, file)
    elif what == "quantised":
        config.write_text(json.dumps({**settings, "quantization_config": {"quant_method": "fp8"}}))
    elif what == "type":
        dtype = "int4"
    with pytest.raises(ValueError, match=message):
        load_offloaded_model(source, tmp_path / "work", dtype)


def test_a_model_on_the_hub_is_fetched_in_safetensors_and_read_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, fetched = write_dense(tmp_path), []

    def fetch(name: str, allow_patterns: list[str], **_: Any) -> str:
        fetched.append(
            (name, {p.name for p in folder.iterdir() if any(p.match(pattern) for pattern in allow_patterns)})
        )
        return str(folder)

    config = load_config(folder)
    monkeypatch.setattr("gqaprune.models.sources.snapshot_download", fetch)
    monkeypatch.setattr("gqaprune.placement.loading_by_layer.load_config", lambda *_: config)
    assert_same(load_model(folder), load_offloaded_model("owner/name", tmp_path / "work"))
    assert fetched == [("owner/name", {"config.json", "generation_config.json", "model.safetensors"})]


def test_a_model_in_memory_is_not_offloaded(tmp_path: Path) -> None:
    model = load_offloaded_model(write_dense(tmp_path), tmp_path / "work")
    assert isinstance(find_store(model), DiskStore)
    assert isinstance(find_store(make_model()), MemoryStore)


def test_a_single_file_goes_before_an_index_as_transformers_has_it(tmp_path: Path) -> None:
    write_dense(tmp_path, max_shard_size="10KB")
    other = make_model(kv_heads=4, seed=1)
    save_file(other.state_dict(), tmp_path / "dense/model.safetensors", {"format": "pt"})
    assert_same(load_model(tmp_path / "dense"), open_dense(tmp_path))
