"""What the README shows is there and runs."""

import re
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tiny import copy_with_context

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def read_code(heading: str) -> list[str]:
    section = README.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)


def test_library_in_five_lines_prunes_and_saves(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = read_code("Five lines")[0].replace("smollm2-135m", str(copy_with_context(tiny_folder, tmp_path / "dense")))
    names: dict[str, object] = {}
    exec(code, names)
    assert names["report"].rate_reached == pytest.approx(0.2, abs=0.01)  # type: ignore[attr-defined]
    AutoModelForCausalLM.from_pretrained(tmp_path / "pruned", trust_remote_code=True)


def test_lightning_example_prunes_recovers_and_exports(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = read_code("In your own Lightning project")[0].replace(
        "smollm2-135m", str(copy_with_context(tiny_folder, tmp_path / "dense"))
    )
    code = code.replace("Trainer(", "Trainer(accelerator='cpu', limit_train_batches=4, limit_val_batches=2, ")
    exec(code.replace('{"window": 512}', '{"window": 128, "tokens": 512}, calibration={"windows": 4}'), {})
    AutoModelForCausalLM.from_pretrained(tmp_path / "lightning_logs/version_0/checkpoint", trust_remote_code=True)
