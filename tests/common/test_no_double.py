"""On a device without float64 everything is measured, cut and repaired, with the results of the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gqaprune.common.precision import find_double_device, sum_in_double, to_double

TESTS = Path(__file__).parents[1]


def test_apples_gpus_leave_float64_to_the_host() -> None:
    assert find_double_device(torch.device("mps", 0)) == torch.device("cpu")
    for device in (torch.device("cpu"), torch.device("cuda", 1)):
        assert find_double_device(device) == device


def test_sums_do_not_round_to_the_type_of_what_they_sum() -> None:
    values = torch.full((2, 4097), 1.0 / 3)
    assert to_double(values).dtype == torch.float64
    assert torch.equal(sum_in_double(values, 1), values.double().sum(1))
    assert sum_in_double(values) == values.double().sum() != values.sum().double()


def test_a_device_without_float64_gets_the_results_of_the_cpu() -> None:
    """The device is simulated: it refuses float64, and tensors of the host beside its own; its kernels round alike."""
    path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    line = [sys.executable, str(TESTS / "apple.py")]
    done = subprocess.run(line, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "this device has none" in found["refusal"]
    assert len(found["cpu"]) > 20 and found["cpu"].keys() == found["apple"].keys()
    for name, numbers in found["cpu"].items():
        assert found["apple"][name] == pytest.approx(numbers, rel=1e-4, abs=1e-6), name
