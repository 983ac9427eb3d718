"""What the ranks of a run do before they have a process group."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RANK_0 = """
import os, subprocess, sys, time
own = {"LOCAL_RANK": "1", "GQAPRUNE_LAUNCHER": str(os.getpid())}
subprocess.Popen([sys.executable, "-c", sys.argv[1]], env=os.environ | own)
time.sleep(300)
"""
RANK_1 = """
import time
from gqaprune.training.launch import end_with_launcher
end_with_launcher()
open("ready", "w").close()
time.sleep(300)
"""


def wait_for(path: Path) -> None:
    for _ in range(1200):
        if path.exists():
            return
        time.sleep(0.1)
    pytest.fail(f"no {path}")


def test_a_rank_ends_with_the_killed_process_that_started_it(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if "RANK" not in name}
    rank_0 = subprocess.Popen(
        [sys.executable, "-c", RANK_0, RANK_1], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True
    )
    wait_for(tmp_path / "ready")
    rank_0.send_signal(signal.SIGKILL)
    assert rank_0.stderr is not None
    said = rank_0.stderr.read()  # to its end, which rank 1 holds open
    rank_0.wait()
    assert "gqaprune: error: rank 0 has ended, and the other ranks with it: it was killed" in said
