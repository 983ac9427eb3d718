"""Optimizers: which parameters decay, how the learning rate runs, how gradients are clipped."""

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gqaprune.cli.lightning_cli import PruningCLI
from gqaprune.module import CausalLMModule
from gqaprune.training.optimizers import OptimizerConfig, clip_gradients, group_parameters, name_matrices

from tiny import make_model


def make_layers() -> nn.Module:
    """Two matrices and two vectors, one of each frozen."""
    layers = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))
    layers[1].requires_grad_(False)
    return layers


def test_matrices_decay_vectors_do_not_and_frozen_ones_are_left_out() -> None:
    layers = make_layers()
    matrices, vectors = group_parameters(layers.named_parameters())
    assert [id(p) for p in matrices["params"]] == [id(layers[0].weight)] and "weight_decay" not in matrices
    assert [id(p) for p in vectors["params"]] == [id(layers[0].bias)] and vectors["weight_decay"] == 0.0


def test_no_group_is_made_for_vectors_that_are_not_there() -> None:
    assert len(group_parameters(nn.Linear(3, 2, bias=False).named_parameters())) == 1


def test_matrices_that_fsdp_has_flattened_decay_by_their_earlier_names() -> None:
    names = name_matrices(make_layers().named_parameters())
    assert names == {"0.weight", "1.weight"}
    flat = [(f"_fsdp_wrapped_module.0.{name}", nn.Parameter(torch.ones(6))) for name in ("weight", "bias")]
    matrices, vectors = group_parameters(flat, names)
    assert [id(p) for p in matrices["params"]] == [id(flat[0][1])]
    assert [id(p) for p in vectors["params"]] == [id(flat[1][1])]


def list_rates(steps: int, **settings: Any) -> list[float]:
    """Learning rate of each optimizer step."""
    config = OptimizerConfig(partial(torch.optim.SGD, lr=1.0), **settings)
    optimizer, scheduler = config.build(make_layers().named_parameters(), steps)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, 0.853553, 0.5, 0.146447]),
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
    ],
)
def test_the_rate_warms_up_and_then_runs_as_scheduled(schedule: str, expected: list[float]) -> None:
    assert list_rates(6, schedule=schedule, warmup_steps=2) == pytest.approx(expected, abs=1e-5)


def test_a_twentieth_of_the_steps_warms_up_unless_said_otherwise() -> None:
    rates = list_rates(40, schedule="constant")
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert list_rates(4, schedule="constant")[0] == 1


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    for number, parameter in enumerate(model.parameters(), 1):
        parameter.grad = torch.full_like(parameter, number * (-1) ** number)
    return torch.optim.SGD(model.parameters(), lr=1.0)


@pytest.mark.parametrize("is_by_norm", [True, False])
def test_gradients_are_clipped_by_their_norm_together_or_each_by_value(is_by_norm: bool) -> None:
    model = make_model("llama", layers=1)
    optimizer = make_optimizer(model)
    before = torch.cat([p.grad.flatten() for p in model.parameters()])
    clip_gradients(model, optimizer, 1.5, is_by_norm)
    after = torch.cat([p.grad.flatten() for p in model.parameters()])
    expected = before * (1.5 / before.norm()) if is_by_norm else before.clamp(-1.5, 1.5)
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=0)


def test_a_bound_of_zero_clips_nothing() -> None:
    model = make_model("llama", layers=1)
    optimizer = make_optimizer(model)
    clip_gradients(model, optimizer, 0.0, True)
    assert float(model.lm_head.weight.grad.abs().max()) > 1


def test_a_module_can_be_copied_and_pickled_with_its_optimizer(tiny_folder: Path) -> None:
    arguments = ["--model.pretrained", str(tiny_folder), "--model.optimizer.lr", "0.5", "--trainer.accelerator", "cpu"]
    modules = (CausalLMModule(str(tiny_folder)), PruningCLI(run=False, args=arguments).model)
    for module, rate in zip(modules, (1e-5, 0.5), strict=True):
        for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            weight = nn.Parameter(torch.ones(2, 2))
            optimizer, _ = copied.optimizer_config.build([("weight", weight)], steps=1)
            assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["lr"] == rate
