"""Whatever is thrown while a model is read is one sentence that names where it was to be read from."""

import os
from pathlib import Path

import pytest

from gqaprune.checkpoints.save import save
from gqaprune.models.loading import load, load_model
from gqaprune.models.loading_guard import guard_loading
from gqaprune.models.sources import locate

from tiny import make_model, make_tokenizer


class PanicException(BaseException):  # noqa: N818: as Rust's libraries call it
    pass


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("too wide\nby far"), "too wide"),
        (KeyError("x"), "KeyError: 'x'"),
        (AssertionError(), "AssertionError"),
        (RecursionError("too deep"), "RecursionError: too deep"),
        (MemoryError(), "MemoryError"),
        (Exception("of tokenizers"), "Exception: of tokenizers"),
        (PanicException("of Rust"), "PanicException: of Rust"),
        (ValueError("x" * 10**4), "x" * 400 + "…"),
    ],
)
def test_any_error_is_one_sentence_and_stays_its_cause(error: BaseException, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught, guard_loading("model", tmp_path, "config.json"):
        raise error
    assert str(caught.value) == f"cannot load a model from '{tmp_path}': config.json: {sentence}"
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_what_ends_a_command_is_not_held_up(stop: type[BaseException]) -> None:
    with pytest.raises(stop), guard_loading("model", "name"):
        raise stop


def test_a_guard_within_another_speaks_alone() -> None:
    with pytest.raises(ValueError) as caught, guard_loading("tokenizer", "a/b"), guard_loading("model", "a/b"):
        raise TypeError("inside")
    assert str(caught.value) == "cannot load a model from 'a/b', which is not a local folder: TypeError: inside"


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_pipes_and_links_to_nowhere_are_refused_before_anything_waits_for_them(name: str, tmp_path: Path) -> None:
    save(make_model("llama"), make_tokenizer(), tmp_path / "model")
    file = tmp_path / "model" / name
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match=f"{file} is a pipe or a device, not a file"):
        load(tmp_path / "model")
    file.unlink()
    file.symlink_to("nowhere")
    with pytest.raises(ValueError, match=f"{file} is a broken link, not a file"):
        load(tmp_path / "model")


@pytest.mark.parametrize("source", ["x" * 5000, "a\0b", "no\nsuch", "/dev/null", "http://a/b", None, 3])
def test_what_names_no_model_is_said_in_a_short_sentence(source: str) -> None:
    with pytest.raises(ValueError) as caught:
        load_model(source)
    assert 20 < len(str(caught.value)) < 1000 and "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_looked_into_is_said_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", refuse)
    with pytest.raises(ValueError, match=f"cannot load a model from '{tmp_path}': Permission denied"):
        locate(tmp_path)
