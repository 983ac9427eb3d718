"""Where models are looked for, and a sentence for what is none."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, LlamaConfig, PretrainedConfig

import gqaprune
from gqaprune.commands.compare import compare
from gqaprune.commands.export import export
from gqaprune.commands.inspect import inspect
from gqaprune.models.fingerprint import fingerprint_weights
from gqaprune.models.loading import build_without_weights, load_model
from gqaprune.models.sources import EMBEDDED_MODEL, fetch, find_weights, load_config, locate, pin
from gqaprune.models.tokenizer import load_tokenizer
from gqaprune.module import CausalLMModule
from gqaprune.placement.loading_by_layer import load_offloaded_model
from gqaprune.placement.model_source import ModelSource

from command import Run
from tiny import make_model, make_tokenizer, make_tokens


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("/no/such/model", "the folder does not exist"),
        ("./here", "the folder does not exist"),
        ("gone.gguf", "no GGUF file at gone.gguf"),
        ("nobody/nothing", "from 'nobody/nothing', which is not a local folder: "),
        ("lama", "from 'lama', which is not a local folder: "),
    ],
)
def test_missing_model_is_said_in_a_sentence(source: str, sentence: str) -> None:
    for load_it in (load_model, load_tokenizer):
        with pytest.raises(ValueError, match=sentence):
            load_it(source)


def test_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a Hugging Face checkpoint: it has no config.json"):
        load_model(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path, max_shard_size="20KB")
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(second), name: tensor}, second, {"format": "pt"})
    with pytest.raises(ValueError, match=f"{name} is in {first.name} and in {second.name}: fetch the model again"):
        load_model(tmp_path)


def test_settings_of_what_a_forward_returns_do_not_count(tmp_path: Path) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"return_dict": False}))
    assert torch.equal(load_model(tmp_path)(make_tokens()).logits, model(make_tokens()).logits)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "no-such-type"}', '{"hidden_size": 3}'])
def test_broken_config_is_said_in_a_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="cannot load a model from") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A checkpoint in several files, beside one that it has no business with."""
    for name in ("model", "other"):
        make_model("llama").save_pretrained(tmp_path / name, max_shard_size="10KB")
    make_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit_index(folder: Path, rename: Callable[[str], Any]) -> None:
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"] = {tensor: rename(name) for tensor, name in data["weight_map"].items()}
    index.write_text(json.dumps(data))


READERS: dict[str, Callable[[str], object]] = {
    "load": load_model,
    "inspect": inspect,
    "find_weights": find_weights,
    "find_fingerprint": fingerprint_weights,
    "layer by layer": lambda folder: load_offloaded_model(folder, Path(folder).with_name("offloaded")),
    "export": lambda folder: export(folder, str(Path(folder).with_name("out"))),
    "compare": lambda folder: compare([folder, folder], corpora=["embedded"]),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("folder", ["../other/", "{parent}/other/", "..\\other\\", "sub/", "C:"])
def test_an_index_names_files_beside_it(shards: Path, reader: str, folder: str) -> None:
    edit_index(shards, lambda name: folder.format(parent=shards.parent) + name)
    with pytest.raises(ValueError, match="must name safetensors files in the same folder, got '"):
        READERS[reader](str(shards))
    assert {path.name for path in shards.parent.iterdir()} == {"model", "other"}


@pytest.mark.parametrize("name", ["", ".", "..", "pytorch_model.bin", 3, None, ["a"]])
def test_an_index_of_no_weights_is_refused(shards: Path, name: Any) -> None:
    edit_index(shards, lambda _: name)
    with pytest.raises(ValueError, match="must name safetensors files|does not say which file holds"):
        load_model(shards)


def test_files_that_are_links_as_in_the_hubs_cache_are_read(shards: Path, tmp_path: Path) -> None:
    expected = load_model(shards).state_dict()
    (tmp_path / "blobs").mkdir()
    for number, path in enumerate(sorted(shards.glob("*.safetensors*"))):
        path.rename(tmp_path / f"blobs/{number}")
        path.symlink_to(f"../blobs/{number}")
    loaded = load_model(shards).state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in expected.items())


def test_a_config_names_no_file_of_weights_and_no_kernel(shards: Path) -> None:
    config = json.loads((shards / "config.json").read_text())
    (shards / "evil.safetensors.index.json").write_text("{}")
    config |= {
        "transformers_weights": "evil.safetensors.index.json",
        "attn_implementation": "org/kernel",
        "experts_implementation": "org/kernel",
    }
    (shards / "config.json").write_text(json.dumps(config))

    model = load_model(shards)

    assert model.config._attn_implementation == "sdpa"
    assert build_without_weights(load_config(shards)).config._attn_implementation == "sdpa"


def test_a_kernel_on_the_hub_is_code_that_has_to_be_trusted(shards: Path) -> None:
    for load_it in (load_model, lambda *settings: ModelSource(*settings).build_without_weights()):
        with pytest.raises(ValueError, match="attn_implementation org/kernel is code on the hub: set trust_remote"):
            load_it(str(shards), "float32", "org/kernel")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A cache of the hub with two revisions of `org/model`, of different weights; revision -> commit."""
    place = tmp_path / "hub/models--org--model"
    commits = {"main": "a" * 40, "old": "b" * 40}
    for seed, (revision, commit) in enumerate(commits.items()):
        gqaprune.save(make_model(seed=seed), make_tokenizer(), place / "snapshots" / commit)
        (place / "refs").mkdir(exist_ok=True)
        (place / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return {revision: str(place / "snapshots" / commit) for revision, commit in commits.items()}


def test_a_revision_is_that_of_config_weights_and_fingerprint_alike(hub: dict[str, str]) -> None:
    for revision, folder in hub.items():
        expected, source = load_model(folder).state_dict(), f"org/model@{revision}"
        for model in (gqaprune.load("org/model", revision=revision)[0], load_model(source)):
            assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
            assert model.name_or_path == source
        assert fingerprint_weights(source) == fingerprint_weights(folder)
        assert fetch(source) == Path(folder)
    assert fingerprint_weights("org/model") == fingerprint_weights(hub["main"])


def test_what_transformers_reads_is_asked_for_at_the_revision(hub: dict[str, str]) -> None:
    Path(hub["old"], "config.json").unlink()
    Path(hub["main"], "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="cannot load a model from 'org/model@old'"):
        load_config("org/model@old")
    load_config("org/model@main")
    shutil.copy(Path(hub["main"], "config.json"), hub["old"])
    assert len(load_tokenizer("org/model", revision="old")) == 258
    with pytest.raises(ValueError, match="cannot load a tokenizer from 'org/model@main'"):
        load_tokenizer("org/model@main")


def test_a_module_records_the_revision(hub: dict[str, str]) -> None:
    module = CausalLMModule("org/model", revision="old")
    assert module.source.pretrained == "org/model@old"
    assert CausalLMModule(**module.hparams).source.pretrained == "org/model@old"


@pytest.mark.parametrize("revision", ["", "a b", "../x", "a@b", "a\nb"])
def test_what_is_no_revision_is_refused(revision: str) -> None:
    with pytest.raises(ValueError, match="is not a revision of org/model"):
        pin("org/model", revision)


def test_a_model_on_this_machine_has_no_revision(shards: Path) -> None:
    for source, revision in ((str(shards), "main"), ("org/model@old", "main")):
        with pytest.raises(ValueError, match="is on this machine or already has one: leave"):
            pin(source, revision)
    shards.rename(shards.with_name("a@b"))
    load_model(shards.with_name("a@b"))


def test_a_command_takes_tokenizer_and_model_at_the_revision(hub: dict[str, str], run: Run) -> None:
    shutil.rmtree(hub["main"])
    assert run("validate", "--model.pretrained", "org/model", "--model.revision", "old") == 0
    assert run("validate", "--model.pretrained", "org/model") == 1


def test_the_config_of_a_gguf_file_is_parsed_once_and_again_when_the_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (embedded, named) = locate(EMBEDDED_MODEL)
    shutil.copy(Path(embedded) / named["gguf_file"], tmp_path / "model.gguf")
    parsed = []

    def parse(*arguments: Any, **options: Any) -> PretrainedConfig:
        parsed.append(arguments)
        return LlamaConfig(hidden_size=576)  # what transformers finds in seconds

    monkeypatch.setattr(AutoConfig, "from_pretrained", parse)
    first = load_config(tmp_path / "model.gguf")
    first.hidden_size = 1
    assert load_config(tmp_path / "model.gguf").hidden_size == 576 and len(parsed) == 1
    os.utime(tmp_path / "model.gguf", ns=(1, 1))
    assert load_config(tmp_path / "model.gguf").hidden_size == 576 and len(parsed) == 2
