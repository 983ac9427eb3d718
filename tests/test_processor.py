"""A processor that announces more than it runs: the process lives, and oneDNN is told."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from gqaprune.processor import SETTING, avoid_illegal_instructions, has_matrix_tiles


@pytest.fixture(autouse=True)
def _announces_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    monkeypatch.delenv(SETTING, raising=False)


def die() -> None:
    os.kill(os.getpid(), signal.SIGILL)


def test_tiles_that_are_illegal_are_left_alone() -> None:
    avoid_illegal_instructions(die)
    assert os.environ[SETTING] == "AVX512_CORE_FP16"


def test_nothing_is_set_where_tiles_work(monkeypatch: pytest.MonkeyPatch) -> None:
    avoid_illegal_instructions(lambda: None)
    assert SETTING not in os.environ
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    avoid_illegal_instructions(die)
    assert SETTING not in os.environ


def test_what_the_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTING, "AVX2")
    avoid_illegal_instructions(die)
    assert os.environ[SETTING] == "AVX2"


def test_bfloat16_products_end_after_it_wherever_this_runs() -> None:
    code = (
        "from gqaprune.processor import avoid_illegal_instructions; avoid_illegal_instructions(); import torch;"
        "print(float((torch.ones(16, 64).bfloat16() @ torch.ones(64, 32).bfloat16()).sum()))"
    )
    environment = {name: value for name, value in os.environ.items() if name != SETTING}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and float(done.stdout) == 16 * 64 * 32


@pytest.mark.parametrize(
    ("allowed", "tiles"),
    [(None, True), ("", True), ("default", True), ("AVX512_CORE_AMX", True), ("AVX512_CORE_FP16", False)],
)
def test_tiles_count_where_they_are_announced_and_allowed(
    allowed: str | None, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if allowed is not None:
        monkeypatch.setenv(SETTING, allowed)
    assert has_matrix_tiles() is tiles
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    assert not has_matrix_tiles()
