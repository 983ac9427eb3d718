"""A processor that announces more than it runs: the process lives, and oneDNN is told."""

import os
import signal
import subprocess
import sys
import timeit

import pytest
import torch

from gqaprune.common.cpu import SETTING, avoid_illegal_instructions, is_faster_in_bfloat16


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
        "from gqaprune.common.cpu import avoid_illegal_instructions; avoid_illegal_instructions(); import torch;"
        "print(float((torch.ones(16, 64).bfloat16() @ torch.ones(64, 32).bfloat16()).sum()))"
    )
    environment = {name: value for name, value in os.environ.items() if name != SETTING}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and float(done.stdout) == 16 * 64 * 32


@pytest.mark.parametrize(("seconds", "is_faster"), [(0.2, True), (0.7, True), (0.8, False), (2.0, False)])
def test_bfloat16_has_to_be_clearly_faster_where_it_is_tried(
    seconds: float, is_faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gqaprune.common.cpu._time_product", {torch.bfloat16: seconds, torch.float32: 1.0}.get)
    is_faster_in_bfloat16.cache_clear()
    try:
        assert is_faster_in_bfloat16() is is_faster
    finally:
        is_faster_in_bfloat16.cache_clear()


def test_the_faster_type_is_what_products_show() -> None:
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        left = torch.randn(1024, 1024).to(dtype)
        seconds[dtype] = min(timeit.repeat(lambda left=left: left @ left, number=1, repeat=5))
    ratio = seconds[torch.bfloat16] / seconds[torch.float32]
    if not 0.5 < ratio < 1:  # nearer to the bound two tries may differ
        assert is_faster_in_bfloat16() is (ratio < 0.75)
