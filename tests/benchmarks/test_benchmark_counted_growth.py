"""Work grows in proportion to text and layers, and ranks share it out; counted, not timed."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import counted_growth
from counted_growth import STAGES, Size, Work, count_work, list_stages, measure_bend

SIZE = Size(layers=4, tokens=5120)
OFF = 0.1


def test_a_straight_line_has_no_bend_and_a_square_one() -> None:
    line, square = ([Work(products=7.0 + n**power, solvers=5.0) for n in (1, 2, 3)] for power in (1, 2))
    assert measure_bend(line) == 0 and measure_bend(square) == pytest.approx(5 / 3 - 1)


def test_stages_grow_in_proportion_to_text() -> None:
    works = [count_work(replace(SIZE, tokens=tokens))[0] for tokens in (2560, 5120, 7680)]
    for stage in STAGES:
        assert abs(measure_bend([each[stage] for each in works])) < OFF, stage


def test_scores_and_repair_grow_in_proportion_to_layers_and_curves_with_their_copies() -> None:
    works = [count_work(replace(SIZE, layers=layers))[0] for layers in (2, 4, 6)]
    for stage in ("scores", "repair"):
        assert abs(measure_bend([each[stage] for each in works])) < OFF, stage
    assert measure_bend([each["curves"] for each in works]) > OFF / 2  # every cut's copy passes all layers after it


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_out_products_and_sum_matrices_once(ranks: int) -> None:
    (alone,) = count_work(SIZE)
    works = count_work(replace(SIZE, ranks=ranks))
    _, least = list_stages(SIZE)
    for stage in STAGES:
        assert len({work[stage].summed for work in works}) == 1
        assert least[stage] <= works[0][stage].summed < (1 + OFF) * least[stage], stage
        assert all(work[stage].solvers == alone[stage].solvers for work in works), stage  # the same on every rank
    for stage in ("scores", "repair"):
        most = max(work[stage].products for work in works)
        assert most < (1 + OFF) * alone[stage].products / ranks, stage
    assert not dist.is_initialized()


def test_tables_are_written_between_their_marks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "r.md"
    monkeypatch.setattr(counted_growth, "describe", lambda size: f"| of {size.layers} layers |")
    monkeypatch.setattr(sys, "argv", ["counted_growth.py", "--results", str(page)])
    for _ in range(2):
        assert counted_growth.main() == 0
    assert page.read_text().count("| of 4 layers |") == page.read_text().count(counted_growth.BEGIN) == 1
