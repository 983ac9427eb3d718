"""A fingerprint tells one model's weights from another's, wherever and however their files are."""

import shutil
from pathlib import Path

import pytest

import gqaprune.models.fingerprint as fingerprint_module
from gqaprune.checkpoints.save import save
from gqaprune.models.fingerprint import find_fingerprint, fingerprint_weights
from gqaprune.planning.selection import keep_everything

from tiny import make_model, make_tokenizer

PLAN = keep_everything(make_model())
"""Marks a checkpoint that may be replaced."""


def test_the_same_tensors_have_one_fingerprint_in_any_folder_and_number_of_files(tmp_path: Path) -> None:
    save(make_model(), None, tmp_path / "one")
    save(make_model(), None, tmp_path / "many", max_shard_size="10KB")
    shutil.copytree(tmp_path / "one", tmp_path / "moved/here")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    assert len({fingerprint_weights(tmp_path / name) for name in ("one", "many", "moved/here")}) == 1


def test_any_tensor_that_differs_gives_another_fingerprint(tmp_path: Path) -> None:
    found = set()
    names = [None, *make_model().state_dict()]
    for name in names:
        model = make_model()
        if name is not None:
            model.state_dict()[name].flatten()[-1] += 0.01
        save(model, None, tmp_path / "model", PLAN)
        found.add(fingerprint_weights(tmp_path / "model"))
    save(make_model().bfloat16(), None, tmp_path / "half")
    assert len({*found, fingerprint_weights(tmp_path / "half")}) == len(names) + 1


def test_large_tensors_are_read_in_samples_all_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint_module, "_SAMPLE", 64)
    monkeypatch.setattr(fingerprint_module, "_EVERY", 640)
    found = []
    for place in (None, 0, 15, 16, 160, 5 * 160 + 3):
        model = make_model()
        weight = model.model.embed_tokens.weight.data.flatten()  # of 6,240 values
        if place is not None:
            weight[place] += 1
        save(model, None, tmp_path / "model", PLAN)
        found.append(fingerprint_weights(tmp_path / "model"))
    assert found[3] == found[0] and len(set(found)) == 5  # value 16 is no sample


def test_a_gguf_file_has_a_fingerprint_and_what_is_no_model_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = make_tokenizer([("e", "d")])
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})
    for seed in (0, 1):
        save(make_model(seed=seed), tokenizer, tmp_path / str(seed), format="gguf-f16")
    assert fingerprint_weights(tmp_path / "0") != fingerprint_weights(tmp_path / "1") != ""
    save(make_model(), None, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    assert find_fingerprint("") == find_fingerprint("./gone") == find_fingerprint("a name") == ""
    assert find_fingerprint(".")
