"""Tables on a terminal of 80 columns show every name and every number."""

from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from gqaprune.commands.inspect import build_memory_table, build_reach_table
from gqaprune.commands.reach import Reach
from gqaprune.commands.sweep import Sweep, build_sweep_table
from gqaprune.common.console import SafeConsole
from gqaprune.planning.memory import PLACES
from gqaprune.reporting.report import Report, Stage, build_table

CORPORA = {"test/wikitext2": 1234.56, "test/embedded": 23.45, "val/sources": 12.34}


def make_stage(name: str, share: float = 1.0) -> Stage:
    return Stage(
        name, round(7_615_616_512 * share), round(6_525_618_688 * share), 57_344, dict(CORPORA), 15_231_233_024
    )


def make_tables() -> dict[str, Table]:
    report = Report("Qwen/Qwen2.5-7B-Instruct", {"rate": 0.2})
    report.stages = [make_stage("dense"), *(make_stage(name, 0.8) for name in ("pruned", "recovered", "exported"))]
    sweep = Sweep({}, Path("sweep.json"), 32_768)
    sweep.results = {rate: make_stage("pruned", 1 - rate) for rate in (0.0, 0.1, 0.2, 0.3)}
    reach = [Reach(kind, 18_944, 10_752, 0.1, 0.1, 0.1, 28, 0.4, 0.5) for kind in ("attention", "mlp")]  # type: ignore[arg-type]
    memory: dict[str, dict[str, float | None]] = {"fine-tuning with adapters": dict.fromkeys(PLACES, 123.0 * 2**30)}
    return {
        "report": build_table(report),
        "sweep": build_sweep_table(sweep),
        "reach": build_reach_table(reach),
        "memory": build_memory_table(memory, 8),
    }


@pytest.mark.parametrize("name", list(make_tables()))
def test_nothing_is_cut_off_at_80_columns(name: str) -> None:
    def show(width: int) -> str:
        text = StringIO()
        SafeConsole(file=text, width=width).print(make_tables()[name])
        return text.getvalue()

    def words(text: str) -> list[Any]:
        return sorted("".join(one for one in text if one.isalnum()))

    assert "…" not in show(80) and max(map(len, show(80).splitlines())) <= 80
    assert words(show(80)) == words(show(300))
