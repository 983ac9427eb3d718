"""The examples run as they are written, on a tiny model."""

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

import gqaprune

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_the_script_prunes_a_plain_lightning_module(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["own_module.py", str(tiny_folder)])
    runpy.run_path(str(EXAMPLES / "own_module.py"), run_name="__main__")
    dense, pruned = (gqaprune.load_model(folder).num_parameters() for folder in (tiny_folder, tmp_path / "pruned"))
    assert f"{dense:,} parameters before, {pruned:,} after; saved in pruned/" in capsys.readouterr().out
    assert pruned < dense


def test_the_notebook_runs_from_top_to_bottom(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    cells = json.loads((EXAMPLES / "quickstart.ipynb").read_text())["cells"]
    names: dict[str, Any] = {}
    for cell in cells:
        source = "".join(cell["source"])
        assert cell["cell_type"] != "code" or not cell["outputs"], "outputs are not committed"
        if cell["cell_type"] == "code":
            source = source.replace('"smollm2-135m"', repr(str(tiny_folder))).replace("WINDOW = 128", "WINDOW = 32")
            exec(compile(source, "quickstart.ipynb", "exec"), names)
    saved = gqaprune.load_model(tmp_path / "pruned")
    assert saved.num_parameters() == names["model"].num_parameters() < gqaprune.load_model(tiny_folder).num_parameters()
    assert "GQA ratio: ✅" in capsys.readouterr().out
