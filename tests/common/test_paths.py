"""Paths as shells have them, in settings of every kind."""

from pathlib import Path

import pytest

import gqaprune
from gqaprune.common.paths import expand_path

from command import Run


def test_home_and_environment_are_expanded_and_all_else_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("TEXTS", "/texts")
    assert [expand_path(text) for text in ("~/a", "$TEXTS/b.txt", "${TEXTS}/c", "a/~b", "org/name", "~")] == [
        "/home/somebody/a",
        "/texts/b.txt",
        "/texts/c",
        "a/~b",
        "org/name",
        "/home/somebody",
    ]
    assert expand_path("$UNKNOWN/a") == "$UNKNOWN/a"


def test_settings_that_name_folders_are_expanded(
    run: Run, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELS", str(tiny_folder.parent))
    monkeypatch.setenv("OUT", str(tmp_path))
    name = f"$MODELS/{tiny_folder.name}"
    assert run("prune", "--model.pretrained", name, "--export.folder", "$OUT/pruned") == 0
    assert gqaprune.load_model(tmp_path / "pruned").num_parameters() < gqaprune.load_model(name).num_parameters()
