"""A device's speeds are those of what it was tried with."""

import torch

from gqaprune.commands.device_speed import measure_device
from gqaprune.commands.stages_table import EFFICIENCY, build_stages_table, estimate_seconds
from gqaprune.planning.costs.base import Cost
from gqaprune.planning.costs.device import Device
from gqaprune.planning.costs.stages import StageCost
from gqaprune.planning.stages import TRAINING


def test_a_cpu_has_speeds_in_each_type_and_no_way_to_a_host() -> None:
    device = measure_device(torch.device("cpu"), torch.float32, seconds=0.01)
    assert device.flops == device.single_flops > device.double_flops / 2 > 0
    assert device.bandwidth > 0 and device.host_bandwidth == device.memory == float("inf")


def test_a_stage_takes_longer_than_at_least_and_one_without_text_has_no_time() -> None:
    device, one = Device("one", 10.0, 10.0, 10.0, 10.0), StageCost("scores", Cost(flops=100), passes=2.5)
    assert estimate_seconds(one, device) == 10 / EFFICIENCY
    table = build_stages_table([one, StageCost(TRAINING, Cost(), 0.0)], device, is_uncounted=True)
    assert list(table.columns[2].cells) == ["2.50", ""]
    assert list(table.columns[3].cells) == ["17 s", "its text is not counted yet"]
