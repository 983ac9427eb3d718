"""benchmarks/recovery.py: what a row trains and measures, and what its tables say."""

import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import quality
import recovery
import recovery_report
import recovery_row

from gqaprune.data.sampling import sample_from_model

from tiny import PLAIN


def make_text(path: Path, lines: int = 120) -> str:
    path.write_text("".join(f"line {index} of a text that says little\n" for index in range(lines)))
    return str(path)


def make_spec(folder: Path, tmp_path: Path, row: dict[str, Any]) -> dict[str, Any]:
    train = make_text(tmp_path / "train.txt")
    tests = {"a": {"corpus": make_text(tmp_path / "a.txt", 60), "split": "all"}}
    pruning = quality.make_spec("default", 0.2, str(folder), train, tests)
    pruning["settings"] = {**PLAIN, "repair": {"method": "none"}}
    pruning["calibration"] |= {"windows": 4, "window": 32, "sampled": 2, "document": 16, "prompts": ["a"]}
    return {
        "model": str(folder),
        "row": {"rate": 1e-2} | row,
        "training": recovery.TRAINING | {"tokens": 2048, "window": 32, "batch": 4, "precision": "32-true"},
        "protocol": {"window": 64, "windows": 3},
        "train": train,
        "tests": tests,
        "teacher_rate": 1e-2,
        "points": [2048] if row.get("sweep") else [0, 512, 2048],
        "work": str(tmp_path / "work"),
        "scratch": str(tmp_path),
        "pruning": pruning,
    }


@pytest.mark.parametrize(
    "row",
    [
        {"mode": "full"},
        {"mode": "lora+distill", "text": "sampled"},
        {"mode": "full", "start": "dense"},
        {"mode": "full", "start": "dense", "rounds": 2},
        {"mode": "distill", "sweep": True},
    ],
    ids=["full", "adapters on sampled text", "dense", "rounds", "sweep"],
)
def test_a_row_trains_and_measures_at_its_points(
    tiny_folder: Path, tmp_path: Path, row: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gqaprune.datamodules.text.sample_from_model", partial(sample_from_model, cache=None))
    result = recovery_row.run_row(make_spec(tiny_folder, tmp_path, row))
    assert [point["tokens"] for point in result["points"]] == ([2048] if row.get("sweep") else [0, 512, 2048])
    assert len(result["losses"]) == 16 and all(map(math.isfinite, result["losses"]))
    texts = {"held-out", "embedded"} if row.get("sweep") else {"a"}
    assert all(set(point["perplexity"]) == texts for point in result["points"])
    seconds = [point["seconds"] for point in result["points"]]
    assert seconds == sorted(seconds) and seconds[-1] > 0 and (row.get("sweep") or seconds[0] == 0 < seconds[1])
    if row["mode"] == "full":
        first, *_, last = (next(iter(point["perplexity"].values())) for point in result["points"])
        assert last < 0.9 * first
    assert (tmp_path / "work/default@0.2").exists() == (row.get("start") != "dense")
    json.dumps(result)


def test_a_teacher_that_was_trained_on_the_text_itself_teaches_it(tiny_folder: Path, tmp_path: Path) -> None:
    spec = make_spec(tiny_folder, tmp_path, {"mode": "distill"})
    by_dense = recovery_row.run_row(spec)
    by_trained = recovery_row.run_row(spec | {"row": spec["row"] | {"trains_teacher": True}})
    assert by_trained["losses"][0] > 2 * by_dense["losses"][0], "the teacher is no farther than the dense model"
    ends = [result["points"][-1]["perplexity"]["a"] for result in (by_dense, by_trained)]
    assert ends[1] < 0.95 * ends[0], ends


def test_what_a_sweep_is_measured_on_is_not_trained_on(tmp_path: Path) -> None:
    text = Path(make_text(tmp_path / "text.txt", 70))
    train, held = recovery_row.split_text(text, tmp_path)
    assert train.read_text() + held.read_text() == text.read_text()
    assert len(held.read_text().splitlines()) == 10


def make_row(name: str, gaps: list[float], **settings: Any) -> dict[str, Any]:
    points = [
        {"point": tokens, "tokens": tokens, "seconds": tokens / 100, "perplexity": {"a": 10 * math.exp(gap), "b": 20.0}}
        for tokens, gap in zip((0, 1000, 2000), gaps, strict=False)
    ]
    inputs = {
        "model": "m",
        "training": recovery.TRAINING,
        "row": {"mode": "full", "rate": 1e-5} | settings,
        "protocol": quality.PROTOCOL,
        "versions": dict.fromkeys(("torch", "lightning", "transformers", "peft"), "1"),
    }
    return {"name": name, "inputs": inputs, "points": points, "peak_rss": 2**30}


def test_tables_give_gaps_to_the_dense_model_untouched_and_trained_alike(tmp_path: Path) -> None:
    rows = [make_row("full", [0.3, 0.2, 0.1]), make_row("dense", [0.0, -0.05, -0.1])]
    header, lines = recovery_report.build_points(rows)
    assert header[6:] == ["tokens", "minutes", "a", "b", "gap to dense trained alike"]
    assert [line[0] for line in lines] == ["dense", "", "", "full", "", ""]
    assert lines[3][6:] == ["0", "0.0", "13.50 (+0.300)", "20.00 (+0.000)", ""]
    assert lines[3][3] == "bfloat16"
    assert lines[5][3:] == ["", "", "", "2,000", "0.3", "11.05 (+0.100)", "20.00 (+0.000)", "+0.200"]
    recovery_report.write_markdown(rows, tmp_path / "r.md")
    before = (tmp_path / "r.md").read_text()
    recovery_report.write_markdown(rows, tmp_path / "r.md")
    assert (tmp_path / "r.md").read_text() == before and "| +0.200 |" in before
    failed = {"name": "lora", "inputs": rows[0]["inputs"], "error": "it | broke"}
    assert recovery_report.build_points([*rows, failed])[1][-1][:2] == ["lora", "failed: it / broke"]


def test_the_sweeps_lowest_is_marked_and_drawn(tmp_path: Path) -> None:
    rows = [make_row(f"sweep {rate:g}", [0, 0, gap], sweep=True, rate=rate) for rate, gap in ((1e-5, 0.2), (1e-4, 0.1))]
    _, lines = recovery_report.build_sweep(rows)
    assert [line[-1].startswith("**") for line in lines] == [False, True]
    recovery_report.draw_sweep(rows, tmp_path / "sweep.png")
    recovery_report.draw_points([*rows, make_row("dense", [0, 0, 0])], tmp_path / "points.png")
    assert (tmp_path / "sweep.png").stat().st_size > 5000 and (tmp_path / "points.png").stat().st_size > 5000


def test_every_row_is_a_known_one() -> None:
    recovery.check_rows(recovery.list_rows())
    assert quality.select_names("full, two rounds", list(recovery.list_rows())) == ["full, two rounds"]
    assert quality.select_names("sweep full*, dense", list(recovery.list_rows())) == [
        "dense",
        *(f"sweep full {r:g}" for r in recovery.SWEEP_RATES["full"]),
    ]
    with pytest.raises(ValueError, match="no row 'lor'; rows are dense; full"):
        quality.select_names("lor", list(recovery.list_rows()))
    with pytest.raises(ValueError, match="row 'x': no setting .'lora_rnak'."):
        recovery.check_rows({"x": {"mode": "lora", "lora_rnak": 4}})
    with pytest.raises(ValueError, match="row 'x': no mode 'lorra'"):
        recovery.check_rows({"x": {"mode": "lorra"}})
