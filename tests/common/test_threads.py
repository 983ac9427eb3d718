"""Waiting threads sleep unless the user says otherwise, which OpenMP reads as torch is loaded."""

import os
import subprocess
import sys

import pytest

from gqaprune.common.threads import SETTINGS

WATCH = """
import os, sys
class Watch:
    def find_spec(self, name, *_):
        if name == "torch":
            print({name: value for name, value in os.environ.items() if name in %r})
            sys.stdout.flush()
            os._exit(0)
sys.meta_path.insert(0, Watch())
"""
"""Prints what OpenMP will read, when torch is about to be imported."""


def read_settings(line: str, **given: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name not in SETTINGS} | given
    code = WATCH % (SETTINGS,) + line
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment).stdout.strip()


@pytest.mark.parametrize("line", ["import gqaprune; gqaprune.prune", "from gqaprune.cli import run"])
def test_threads_are_to_sleep_before_torch_is_imported(line: str) -> None:
    assert read_settings(line) == "{'OMP_WAIT_POLICY': 'passive'}"


@pytest.mark.parametrize("given", [{"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "300000"}, {"KMP_BLOCKTIME": "9"}])
def test_what_the_user_has_set_stays(given: dict[str, str]) -> None:
    assert read_settings("import gqaprune; gqaprune.prune", **given) == str(given)
