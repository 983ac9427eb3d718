"""Gram matrices in panels against torch.linalg on whole ones, and where the panels are."""

import errno
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gqaprune.surgery import gram
from gqaprune.surgery.gram import Gram, Memory, Panels

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from measuring import watch_memory

CPU = torch.device("cpu")
SIZE = 24
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.fixture(params=[2**29, 8 * 8 * 5 * SIZE, 1], ids=["one panel", "5 rows a panel", "1 row a panel"])
def workspace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(gram, "WORKSPACE", request.param)
    return int(request.param)


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def make_inputs(tokens: int = 40, seed: int = 0) -> Tensor:
    """Small whole numbers: their products are exact in float32, in any order."""
    return torch.randint(-5, 6, (tokens, SIZE), generator=torch.Generator().manual_seed(seed)).float()


def make_gram(device: torch.device, seed: int = 0) -> tuple[Gram, Tensor]:
    """The same matrix in panels and whole, on the CPU."""
    found, x_NS = Gram(SIZE, Memory(device)), make_inputs(seed=seed)
    for part_NS in x_NS.to(device).split(25):
        found.add(part_NS)
    return found, x_NS.double().T @ x_NS.double()


def read_lower(panels: Panels) -> Tensor:
    """Its lower triangle, whole."""
    whole_SS = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    for rows, panel in zip(panels.slices, panels.panels, strict=True):
        whole_SS[rows, : rows.stop] = panel.cpu()
    return whole_SS.tril()


def test_panels_hold_the_sum_of_products(workspace: int, device: torch.device) -> None:
    found, whole_SS = make_gram(device)
    assert len(found.panels) == {2**29: 1, 1: SIZE}.get(workspace, 5)
    assert torch.equal(read_lower(found), whole_SS.tril()) and found.tokens == 40
    assert torch.equal(found.get_diagonal().cpu(), whole_SS.diagonal())
    left_RS = torch.randn(3, SIZE, dtype=torch.float64)
    torch.testing.assert_close(found.multiply(left_RS.to(device)).cpu(), left_RS @ whole_SS, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("in_place", [False, True])
def test_factor_solves_and_inverts_as_whole_matrices_do(workspace: int, device: torch.device, in_place: bool) -> None:
    (one, one_SS), (other, other_SS) = make_gram(device), make_gram(device, seed=1)
    penalty_S = torch.linspace(0, 9, SIZE, dtype=torch.float64)
    whole_SS = one_SS + other_SS + penalty_S.diag()
    factor = one if in_place else Panels(SIZE, Memory(device))
    assert factor.factorise([one, other], penalty_S.to(device))
    torch.testing.assert_close(read_lower(factor), torch.linalg.cholesky(whole_SS), rtol=1e-9, atol=1e-9)
    right_RS = torch.randn(3, SIZE, dtype=torch.float64)
    solved_RS = right_RS.clone().to(device)
    factor.solve(solved_RS)
    torch.testing.assert_close(
        solved_RS.cpu(), torch.linalg.solve(whole_SS, right_RS, left=False), rtol=1e-9, atol=1e-12
    )
    inverse_SS = torch.linalg.inv(whole_SS)
    for width in (1, 4, SIZE):
        expected = [inverse_SS[a : a + width, a : a + width] for a in range(0, SIZE, width)]
        found = factor.invert_diagonal(width).cpu()
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-9, atol=1e-14)


def test_few_columns_of_the_inverse_are_solved_for_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram, "COLUMNS", 5)
    factor, whole_SS = make_gram(CPU)
    assert factor.factorise([factor], torch.zeros(SIZE, dtype=torch.float64))
    inverse_SS = torch.linalg.inv(whole_SS)
    torch.testing.assert_close(factor.invert_diagonal(1).flatten(), inverse_SS.diagonal(), rtol=1e-9, atol=0)
    seen = factor.invert_diagonal(2)
    torch.testing.assert_close(seen[11], inverse_SS[22:, 22:], rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("column", [0, 7, SIZE - 1])
def test_a_sum_that_is_not_positive_definite_has_no_factor(workspace: int, column: int) -> None:
    found, _ = make_gram(CPU)
    penalty_S = torch.zeros(SIZE, dtype=torch.float64)
    penalty_S[column] = -found.get_diagonal()[column] - 1
    assert not Panels(SIZE, Memory(CPU)).factorise([found], penalty_S)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_shows(workspace: int, value: float) -> None:
    found, x_NS = Gram(SIZE, Memory(CPU)), make_inputs()
    found.add(x_NS)
    assert found.is_finite()
    x_NS[3, 17] = value
    found.add(x_NS)
    assert not found.is_finite()


def find_mapping(tensor: Tensor) -> str:
    """Line of /proc/self/maps with a tensor's memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line
    raise AssertionError("not mapped")


def test_what_a_cpu_has_no_room_for_is_in_files_without_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(gram, "WORKSPACE", 8 * 1000)
    memory = Memory(CPU)
    kept = [memory.make_zeros(10, 10) for _ in range(6)]  # 800 bytes each, 3,000 may stay
    are_in_files = [str(tmp_path) in (line := find_mapping(each)) and "(deleted)" in line for each in kept]
    assert are_in_files == [False] * 3 + [True] * 3 and not list(tmp_path.iterdir())
    narrow = memory.make_zeros(3, 7, torch.bfloat16)
    assert narrow.shape == (3, 7) and narrow.dtype == torch.bfloat16 and not any(each.any() for each in [*kept, narrow])
    kept[4][2, 3], kept[5][2, 3] = 1.0, 2.0
    assert kept[4].sum() == 1 and kept[5].sum() == 2


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(gram, "WORKSPACE", 800)
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    with pytest.raises(ValueError, match=rf"{tmp_path} has no space for a Gram matrix of 8 MB \(No space.*set TMPDIR"):
        Memory(CPU).make_zeros(1000, 1000)
    assert not list(tmp_path.iterdir())


def test_large_matrices_are_in_files_where_none_can_be_allocated_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(gram, "WORKSPACE", 800)
    monkeypatch.delattr(os, "posix_fallocate")
    matrix = Memory(CPU).make_zeros(700, 300)
    assert matrix.shape == (700, 300) and not matrix.any() and not list(tmp_path.iterdir())


def test_own_memory_stays_near_the_workspace_and_below_one_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    size, workspace = 3000, 2**25
    monkeypatch.setattr(gram, "WORKSPACE", workspace)
    x_NS, right_RS = torch.randn(64, size), torch.randn(100, size, dtype=torch.float64)
    with watch_memory() as growth:
        found = Gram(size, Memory(CPU))
        found.add(x_NS)
        assert found.factorise([found], torch.ones(size, dtype=torch.float64))
        found.solve(right_RS)
        found.invert_diagonal(1)
    kept = sum(panel.nbytes for panel in found.panels)
    assert growth["RssFile"] > 0.9 * kept - workspace * 3 / 8
    assert growth["RssAnon"] < 1.5 * workspace < 8 * size * size  # what the products' library takes is beside it


def test_a_gpu_keeps_what_half_of_its_free_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    free, reserved, allocated = 60 * 2**30, 9 * 2**30, 5 * 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert gram.find_room(gpu) == 32 * 2**30 and gram.find_room(gpu, spared=4 * 2**30) == 30 * 2**30
    free = reserved = allocated = 0
    assert gram.find_room(gpu) == gram.find_room(cpu) == gram.WORKSPACE * 3 // 8  # a full GPU is no worse off
