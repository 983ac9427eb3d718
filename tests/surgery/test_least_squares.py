"""Ridge least squares from moments, in panels, against torch.linalg.lstsq on the tokens."""

import pytest
import torch
from torch import Tensor

from gqaprune.surgery import gram
from gqaprune.surgery.gram import Memory, Panels
from gqaprune.surgery.least_squares import Moments, refit, search_downhill

INPUTS, OUTPUTS = 13, 7
INFINITE = float("inf")
MEMORY = Memory(torch.device("cpu"))


def make_tokens(tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs, the last of them a constant, and targets: small whole numbers, whose products are exact."""
    generator = torch.Generator().manual_seed(seed)
    x_NS, y_ND = (torch.randint(-5, 6, (tokens, n), generator=generator).float() for n in (INPUTS, OUTPUTS))
    x_NS[:, -1] = 1
    return x_NS, y_ND


def make_moments(x_NS: Tensor, y_ND: Tensor) -> Moments:
    moments = Moments(INPUTS, OUTPUTS, Memory(torch.device("cpu")))
    moments.add(x_NS, y_ND)
    return moments


def solve(dtype: torch.dtype, ridge: float, start_DS: Tensor) -> tuple[float, Tensor]:
    """Fit to what is missing, on two texts together; judged on the second."""
    parts = [make_moments(*make_tokens(tokens, seed)) for seed, tokens in enumerate((50, 30))]
    new_DS = torch.full_like(start_DS, torch.nan)
    factor = Panels(INPUTS, Memory(torch.device("cpu")))
    error = refit(start_DS, parts, parts[1], ridge, INPUTS - 1, factor, new_DS.__setitem__)
    assert new_DS.dtype == dtype
    return error, new_DS


def make_start(dtype: torch.dtype) -> Tensor:
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(2)).to(dtype)


@pytest.mark.parametrize("workspace", [2**29, 2000, 1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_are_those_of_lstsq_and_errors_theirs_as_stored(
    monkeypatch: pytest.MonkeyPatch, workspace: int, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(gram, "WORKSPACE", workspace)
    start_DS, ridge = make_start(dtype), 0.3
    error, new_DS = solve(dtype, ridge, start_DS)

    texts = [tuple(part.double() for part in make_tokens(tokens, seed)) for seed, tokens in enumerate((50, 30))]
    x_NS, y_ND = (torch.cat(parts) for parts in zip(*texts, strict=True))
    penalty = (ridge * x_NS.square().sum(0)[:-1].mean()).sqrt()
    rows_NS = torch.cat([x_NS, penalty * torch.eye(INPUTS, dtype=torch.float64)[:-1]])
    change_SD = torch.linalg.lstsq(rows_NS, torch.cat([y_ND, torch.zeros(INPUTS - 1, OUTPUTS)])).solution
    expected_DS = (start_DS.double() + change_SD.T).to(dtype)
    torch.testing.assert_close(new_DS, expected_DS, rtol=1e-10 if dtype == torch.float64 else 0, atol=0)
    x_NS, y_ND = texts[1]
    left_ND = x_NS @ (new_DS.double() - start_DS.double()).T - y_ND
    assert error == pytest.approx(float(left_ND.square().sum()), rel=1e-10)


@pytest.mark.parametrize("workspace", [2**29, 1])
def test_a_ridge_too_weak_writes_nothing(monkeypatch: pytest.MonkeyPatch, workspace: int) -> None:
    monkeypatch.setattr(gram, "WORKSPACE", workspace)
    x_NS, y_ND = make_tokens(40, 0)
    x_NS[:, 4] = x_NS[:, 9]
    factor = Panels(INPUTS, MEMORY)
    moments, written = make_moments(x_NS, y_ND), []
    arguments = (make_start(torch.float32), [moments], moments)
    assert refit(*arguments, 0.0, INPUTS - 1, factor, lambda *_: written.append(_)) == float("inf") and not written
    assert refit(*arguments, 0.1, INPUTS - 1, factor, lambda *_: written.append(_)) < moments.energy and written


def test_numbers_do_not_depend_on_the_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {}
    for workspace in (2**29, 1000):
        monkeypatch.setattr(gram, "WORKSPACE", workspace)
        found[workspace] = solve(torch.float64, 0.1, make_start(torch.float64))
    (error, weights), (other_error, other_weights) = found.values()
    assert error == pytest.approx(other_error, rel=1e-11)
    torch.testing.assert_close(weights, other_weights, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("errors", "measured"),
    [
        ([5, 4, 3, 2, 1], [3, 2, 1]),
        ([1, 2, 3, 4, 5], [3, 4, 2, 1]),
        ([5, 4, 3, 4, 5], [3, 4, 4]),
        ([4, 2, 3, 4, 5], [3, 4, 2, 4]),
        ([INFINITE, INFINITE, INFINITE, 2, 3], [INFINITE, 2, 3]),
        ([INFINITE, INFINITE, INFINITE, INFINITE, 3], [INFINITE, INFINITE, 3]),
        ([1, 2], [2, 1]),
        ([1], [1]),
    ],
)
def test_ridges_are_searched_from_the_middle_one_to_where_both_neighbours_are_worse(
    errors: list[float], measured: list[float]
) -> None:
    by_ridge, seen = dict(zip((0.1, 0.2, 0.3, 0.4, 0.5), errors, strict=False)), []

    def measure(ridge: float) -> float:
        seen.append(by_ridge[ridge])
        return by_ridge[ridge]

    search_downhill(list(by_ridge)[::-1], measure)  # in any order
    assert seen == measured
