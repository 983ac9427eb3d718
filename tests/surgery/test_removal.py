"""What a block loses without some of its units is what least squares, solved directly, cannot make up for."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from gqaprune.models.architecture import Block
from gqaprune.plan import BlockKey
from gqaprune.surgery import gram
from gqaprune.surgery.gram import Gram, Memory
from gqaprune.surgery.removal import RIDGE, remove_one_by_one, remove_weakest

CPU = torch.device("cpu")


def make_block(units: int, size: int, kind: str = "mlp", groups: int = 1) -> Block:
    torch.manual_seed(0)
    return Block(
        BlockKey(0, kind), units, (), nn.Linear(units * size, 7, bias=False).requires_grad_(False), size, groups
    )  # type: ignore[arg-type]


def make_inputs(columns: int, seed: int) -> Tensor:
    """Inputs that depend on one another."""
    generator = torch.Generator().manual_seed(seed)
    mixture = torch.randn(columns, columns, generator=torch.Generator().manual_seed(9))
    return torch.randn(200, columns, generator=generator) @ mixture


def sum_gram(x_NC: Tensor) -> Gram:
    summed = Gram(x_NC.shape[1], Memory(CPU))
    summed.add(x_NC)
    return summed


def solve(weight_DC: Tensor, x_NC: Tensor, kept: list[int]) -> Tensor:
    """The loss of weights that ridge regression gives on the kept inputs, with the penalty as rows of its own."""
    weight_DC, x_NC = weight_DC.double(), x_NC.double()
    removed = [column for column in range(weight_DC.shape[1]) if column not in kept]
    penalty = (RIDGE * float(x_NC.square().sum(0).mean())) ** 0.5
    rows = torch.cat([x_NC[:, kept], penalty * torch.eye(len(kept), dtype=torch.float64)])
    lacking = torch.cat([x_NC[:, removed] @ weight_DC[:, removed].T, torch.zeros(len(kept), 7, dtype=torch.float64)])
    loss_DC = torch.zeros_like(weight_DC)
    loss_DC[:, removed] = weight_DC[:, removed]
    loss_DC[:, kept] = -torch.linalg.lstsq(rows, lacking).solution.T
    return loss_DC


def list_columns(units: list[int], size: int) -> list[int]:
    return [unit * size + column for unit in units for column in range(size)]


@pytest.mark.parametrize("workspace", [gram.WORKSPACE, 8 * 8 * 12])
def test_weakest_channels_leave_what_ridge_regression_leaves(workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "WORKSPACE", workspace)  # the smaller one holds a row at a time
    block, x_NC = make_block(12, 1), make_inputs(12, 0)
    order_C = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    lost = remove_weakest(block, sum_gram(x_NC[:, order_C]), order_C, [3, 6, 11], refits=True)
    for loss_DC, removed in zip(lost, [3, 6, 11], strict=True):
        expected = solve(block.output.weight, x_NC, sorted(order_C[: 12 - removed].tolist()))
        torch.testing.assert_close(loss_DC.double(), expected, rtol=1e-4, atol=1e-4)


def test_without_refit_the_loss_is_the_removed_columns() -> None:
    block, x_NC = make_block(12, 1), make_inputs(12, 0)
    order_C = torch.arange(12).flip(0)
    (loss_DC,) = remove_weakest(block, sum_gram(x_NC[:, order_C]), order_C, [4], refits=False)
    assert loss_DC[:, 4:].eq(0).all() and loss_DC[:, :4].equal(block.output.weight[:, :4])
    attention = replace(make_block(4, 3), key=BlockKey(0, "attention"))
    (loss_DC,), order = remove_one_by_one(attention, sum_gram(x_NC), sum_gram(x_NC), (), [1], refits=False)
    columns = list_columns(order[:1], 3)
    assert loss_DC[:, columns].equal(attention.output.weight[:, columns]) and int(loss_DC.ne(0).sum()) == 3 * 7


@pytest.mark.parametrize("groups", [1, 2])
def test_groups_go_as_trying_every_one_on_held_out_tokens_says(groups: int) -> None:
    block, fit_NC, judged_NC = make_block(6, 2, "attention", groups), make_inputs(12, 0), make_inputs(12, 5)
    lost, order = remove_one_by_one(block, sum_gram(fit_NC), sum_gram(judged_NC), (), [1, 2], refits=True)
    left, size = list(range(6)), 6 // groups
    for number in range(2 * groups):
        group = number % groups
        candidates = [unit for unit in left if unit // size == group]
        errors = {}
        for unit in candidates:
            loss_DC = solve(block.output.weight, fit_NC, list_columns([other for other in left if other != unit], 2))
            errors[unit] = float((judged_NC.double() @ loss_DC.T).square().sum())
        best = min(errors, key=errors.__getitem__)
        assert order[number] == best
        left.remove(best)
        if group == groups - 1:
            expected = solve(block.output.weight, fit_NC, list_columns(left, 2))
            torch.testing.assert_close(lost[number // groups].double(), expected, rtol=1e-4, atol=1e-4)
    assert sorted(order) == list(range(6))


def test_protected_units_go_last() -> None:
    block, x_NC = make_block(6, 2, "attention"), make_inputs(12, 0)
    first = remove_one_by_one(block, sum_gram(x_NC), sum_gram(x_NC), (), [1], refits=True)[1][:2]
    order = remove_one_by_one(block, sum_gram(x_NC), sum_gram(x_NC), first, [1], refits=True)[1]
    assert set(order[-2:]) == set(first)


def test_inputs_that_are_never_there_cost_nothing() -> None:
    block, x_NC = make_block(12, 1), torch.zeros(5, 12)
    (loss_DC,) = remove_weakest(block, sum_gram(x_NC), torch.arange(12), [6], refits=True)
    assert loss_DC.isfinite().all()
    attention = make_block(4, 3, "attention")
    (loss_DC,), _ = remove_one_by_one(attention, sum_gram(x_NC), sum_gram(x_NC), (), [2], refits=True)
    assert loss_DC.isfinite().all()
