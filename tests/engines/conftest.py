"""The engines' own Python, and what to ask it; `make test-engines` sets it up."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# vLLM's threads spin, which on few cores slows all of them.
QUIET = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
    "GOMP_SPINCOUNT": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
}


@pytest.fixture(scope="session")
def engines() -> Path:
    """Folder of the engines' commands, `python` and `vllm` among them."""
    folder = ROOT / ".venv-engines/bin"
    if not (folder / "python").exists():
        pytest.skip("the engines are not installed: make test-engines")
    return folder


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Environment variables of the engines' processes."""
    return {**os.environ, **QUIET}
