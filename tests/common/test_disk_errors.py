"""A full or broken disk is said with the file, what it takes and what is free, whoever writes."""

import errno
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gqaprune.common.atomic_files import replace_folder, write_atomically
from gqaprune.common.disk_errors import DiskError, explain_disk_errors


@contextmanager
def allow_files_of(size: int) -> Iterator[None]:
    """Let files grow to a size and no further."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_that_does_not_fit_is_named_with_what_it_takes_and_what_is_free(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    with allow_files_of(1000), pytest.raises(DiskError) as caught:
        write_atomically(path, bytes(3_000_000))
    pattern = (
        rf"cannot write {path}: File too large; it needs 3\.0 MB, [\d,.]+ MB are free in {tmp_path}; free space .*"
    )
    assert re.fullmatch(pattern, str(caught.value)) and caught.value.errno == errno.EFBIG
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"] and path.read_text() == "old"


def test_whoever_writes_into_a_folder_is_understood(tmp_path: Path) -> None:
    weight = torch.zeros(100_000)
    for write in (
        lambda folder: save_file({"weight": weight}, folder / "model.safetensors"),
        lambda folder: torch.save(weight, folder / "model.pt"),
        lambda folder: (folder / "config.json").write_bytes(bytes(20_000)),
    ):
        with (
            pytest.raises(DiskError, match="it needs 400,000 bytes, .* are free in"),
            allow_files_of(10_000),
            replace_folder(tmp_path / "out", weight.nbytes) as folder,
        ):
            write(folder)
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG])
def test_every_way_that_a_disk_fails_is_said(code: int, tmp_path: Path) -> None:
    for error in (OSError(code, os.strerror(code)), RuntimeError(f"I/O error: {os.strerror(code)} (os error {code})")):
        with (
            pytest.raises(DiskError, match=f"^cannot write {tmp_path}/a/b: {os.strerror(code)}; .* free") as caught,
            explain_disk_errors(tmp_path / "outer"),
            explain_disk_errors(tmp_path / "a/b"),
        ):
            raise error
        assert "\n" not in str(caught.value)


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    for error in (FileNotFoundError(errno.ENOENT, "none"), PermissionError(errno.EACCES, "no"), ValueError("x")):
        with pytest.raises(type(error)) as caught, explain_disk_errors(tmp_path):
            raise error
        assert caught.value is error
