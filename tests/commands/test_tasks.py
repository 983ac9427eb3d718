"""Tasks of lm-evaluation-harness, described in a folder, on tiny models."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gqaprune.commands.compare import compare
from gqaprune.commands.tasks import Score, Tasks, _read_scores

from tiny import make_model, make_tokenizer

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
DOCUMENTS = [
    {"question": f"{letter} {letter} {letter}", "choices": ["a", "b", "c", "d"], "answer": index % 4}
    for index, letter in enumerate("abcdefghij")
]

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A task on a local file, and one whose file is missing."""
    rows = "".join(json.dumps(document) + "\n" for document in DOCUMENTS)
    (tmp_path / "documents.jsonl").write_text(rows)
    (tmp_path / "letters.yaml").write_text(TASK.format(name="letters", file=tmp_path / "documents.jsonl"))
    (tmp_path / "lost.yaml").write_text(TASK.format(name="lost", file=tmp_path / "nothing.jsonl"))
    return tmp_path


@needs_harness
@pytest.mark.parametrize("limit", [None, 6])
def test_score_is_the_share_of_documents_whose_right_choice_is_likeliest(folder: Path, limit: int | None) -> None:
    model, tokenizer = make_model(), make_tokenizer()
    hits = []
    for document in DOCUMENTS[:limit]:
        ids = torch.tensor([tokenizer(document["question"])["input_ids"] + tokenizer(" ")["input_ids"]])
        with torch.no_grad():
            log = model(ids).logits.log_softmax(-1)[0]
        choices = [float(log[-1, tokenizer(choice)["input_ids"][0]]) for choice in "abcd"]  # all after one space
        hits.append(float(choices.index(max(choices)) == document["answer"]))
    found = Tasks(["letters"], limit, str(folder)).run(model, tokenizer)
    mean = sum(hits) / len(hits)
    assert list(found) == ["letters acc"] and found["letters acc"].value == pytest.approx(mean)
    error = (mean * (1 - mean) / (len(hits) - 1)) ** 0.5
    assert found["letters acc"].error == pytest.approx(error)


@needs_harness
def test_compare_runs_tasks_on_every_model(folder: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {"corpora": [], "speed": False, "tasks_folder": str(folder), "tasks_limit": 6}
    compare([str(tiny_folder), str(tiny_folder)], tasks="letters", json=True, **settings)
    found = json.loads(capsys.readouterr().out)
    for row in found["models"]:
        assert set(row["tasks"]) == {"letters acc"} and 0 <= row["tasks"]["letters acc"]["value"] <= 1
        assert row["tasks"]["letters acc"]["error"] >= 0
    assert found["protocol"][-1].endswith("first 6 documents of each, ± standard error")
    compare([str(tiny_folder), str(tiny_folder)], tasks="letters", **settings)
    assert "letters acc" in capsys.readouterr().out


@needs_harness
@pytest.mark.parametrize(
    ("name", "place", "sentence"),
    [
        ("unknown", "", r"no task 'unknown' in lm_eval or .*: `lm_eval ls tasks` lists"),
        ("lost", "", r"tasks lost cannot be read: .*nothing\.jsonl"),
        ("letters", "nowhere", r"tasks_folder .*nowhere is not a folder"),
    ],
)
def test_tasks_that_cannot_be_run_are_named(folder: Path, name: str, place: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Tasks([name], None, str(folder / place))


def test_without_the_harness_the_error_names_the_extra(
    tiny_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"tasks letters need lm_eval: pip install 'gqaprune\[eval\]'"):
        compare([str(tiny_folder), str(tiny_folder)], tasks="letters", tasks_folder=str(folder))


def test_scores_are_read_with_metric_filter_and_standard_error() -> None:
    row = {
        "alias": "letters",
        "sample_len": 3,
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "f1,strict": 0.25,
        "f1_stderr,strict": 0.05,
        "bleu,none": 2,
        "bleu_stderr,none": "N/A",
    }
    assert _read_scores("letters", row) == [
        ("letters acc", Score(0.5, 0.1)),
        ("letters f1 (strict)", Score(0.25, 0.05)),
        ("letters bleu", Score(2.0, None)),
    ]
