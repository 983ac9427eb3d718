"""The dense model of a pruned checkpoint is the one that was pruned, from every folder, or none."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gqaprune
from gqaprune import CalibrationSet, PruningPlan
from gqaprune.checkpoints.origin import find_dense, find_teacher
from gqaprune.placement.model_source import ModelSource
from gqaprune.training.recovery import RecoveryConfig

from tiny import make_model, make_plain, make_tokenizer


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a dense model and a pruned one, whose plan was made by the dense one's bare name in it."""
    gqaprune.save(make_model(), make_tokenizer(), tmp_path / "here/dense")
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    prune("dense", "pruned")
    return tmp_path


def prune(dense: str, folder: str, source: str | None = None) -> None:
    model, tokenizer = gqaprune.load(dense)
    calibration = CalibrationSet([], source=dense if source is None else source)
    plan, report = gqaprune.prune(model, calibration, make_plain(rate=0.2, criterion="l2", allocation="uniform"))
    assert report.model == plan.model
    gqaprune.save(model, tokenizer, folder, plan)


def change_plan(folder: Path, **values: Any) -> None:
    replace(PruningPlan.load(folder / "plan.json"), **values).save(folder / "plan.json")


def find_students_teacher(pretrained: Path | str) -> str:
    return find_teacher(ModelSource(str(pretrained)), RecoveryConfig("distill")).pretrained


@pytest.mark.parametrize("typed", ["dense", "./dense", "../here/dense/"])
def test_the_dense_model_is_found_from_every_folder(typed: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prune(typed, "pruned")
    monkeypatch.chdir(place / "there")
    gqaprune.save(make_model(seed=1), make_tokenizer(), "dense")  # which has the name that was typed
    assert find_dense(str(place / "here/pruned")) == str(place / "here/dense")
    assert find_students_teacher("../here/pruned") == str(place / "here/dense")
    shutil.move(place / "here/pruned", "moved")
    assert find_dense("moved") == str(place / "here/dense")


def replace_dense(seed: int, **shapes: Any) -> None:
    shutil.rmtree("dense")
    gqaprune.save(make_model(seed=seed, **shapes), make_tokenizer(), "dense")


def test_another_model_under_the_name_is_refused_and_the_same_one_saved_again_is_not(place: Path) -> None:
    replace_dense(0)
    assert find_dense("pruned") == str(place / "here/dense")
    replace_dense(1)
    expected = (
        f"the plan of pruned names {place}/here/dense: {place}/here/dense is not the model that the plan was made"
    )
    with pytest.raises(ValueError, match=f"{expected} for .*its weights have the fingerprint .*, expected"):
        find_dense("pruned")
    with pytest.raises(ValueError, match="no teacher to learn from: .* expected .*; set model.recovery"):
        find_students_teacher("pruned")
    assert find_teacher(ModelSource("pruned"), RecoveryConfig("distill", teacher="any")).pretrained == "any"
    replace_dense(0, channels=24)
    with pytest.raises(ValueError, match="another model has this name: layer 0 channels 20 against 24"):
        find_dense("pruned")


def test_a_plan_from_before_fingerprints_is_held_against_shapes(place: Path) -> None:
    data = json.loads(Path("pruned/plan.json").read_text())
    del data["fingerprint"]
    Path("pruned/plan.json").write_text(json.dumps(data | {"model": "dense"}))
    assert find_dense("pruned") == "dense"
    replace_dense(0, channels=24)
    with pytest.raises(
        ValueError, match="the plan of pruned names dense: another model has this name: layer 0 channels"
    ):
        find_dense("pruned")


def test_where_the_dense_model_is_not_found_it_is_said_why(place: Path) -> None:
    change_plan(place / "here/pruned", model=str(place / "gone"))
    with pytest.raises(ValueError, match=f"the plan of pruned names {place}/gone: no model at {place}/gone"):
        find_dense("pruned")
    with pytest.raises(ValueError, match="no teacher to learn from: the plan of pruned names .*; set model"):
        find_students_teacher("pruned")
    change_plan(place / "here/pruned", model="")
    with pytest.raises(ValueError, match="the plan of pruned does not name the dense model"):
        find_dense("pruned")
    change_plan(place / "here/pruned", model=str(place / "here/pruned"))
    with pytest.raises(ValueError, match="the plan of pruned names itself"):
        find_dense("pruned")


def test_a_dense_model_has_no_plan_whatever_lies_in_the_working_folder(place: Path) -> None:
    shutil.copy("pruned/plan.json", "plan.json")
    for name in ("dense", "smollm2-135m", "owner"):
        with pytest.raises(ValueError, match=f"{name} has no plan that names the dense model"):
            find_dense(name)
        assert find_students_teacher(name) == name


def test_names_that_are_no_folder_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("owner/name", "smollm2-135m", "", "my model"):
        assert CalibrationSet([], source=name).source == name
    Path("smollm2-135m").mkdir()
    Path("owner/name").mkdir(parents=True)
    assert CalibrationSet([], source="smollm2-135m").source == "smollm2-135m"
    assert CalibrationSet([], source="owner/name").source == str(tmp_path / "owner/name")


@pytest.mark.parametrize("name", ["org/model", "model", "//host/share/model", "\\\\host\\share\\model", "s3://model"])
def test_a_model_that_a_plan_names_is_not_fetched(place: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gqaprune.checkpoints.origin.load_config", lambda *_: pytest.fail("opened"))
    change_plan(Path("pruned"), model=name)
    with pytest.raises(ValueError, match="and models that only a plan names are not downloaded"):
        find_dense("pruned")
    with pytest.raises(ValueError, match=r"no teacher to learn from: .*; set model\.recovery\.teacher"):
        find_students_teacher("pruned")


def test_code_of_a_model_that_a_plan_names_is_not_trusted(place: Path) -> None:
    student = ModelSource("pruned", trust_remote_code=True)
    assert not find_teacher(student, RecoveryConfig("distill")).trust_remote_code
    assert find_teacher(student, RecoveryConfig("distill", teacher="any")).trust_remote_code
