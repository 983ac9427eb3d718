"""The cache is the user's, or a temporary folder where there is none to write to."""

import os
import tempfile
from pathlib import Path

import pytest

from gqaprune.common.cache_folder import find_cache_folder


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "new"))
    assert find_cache_folder("a") == tmp_path / "new/gqaprune/a"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_cache_folder("a") == tmp_path / ".cache/gqaprune/a"
    assert not list(tmp_path.iterdir())


def test_without_a_home_or_where_it_cannot_be_written_the_cache_is_temporary(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folders = [find_cache_folder("a")]
    monkeypatch.undo()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as without HOME and an entry in passwd
    folders.append(find_cache_folder("a"))
    assert all(folder.is_relative_to(tempfile.gettempdir()) and folder.name == "a" for folder in folders)
