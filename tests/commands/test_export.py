"""`gqaprune export`: any format from any other, with plan and card, and errors in a sentence."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gqaprune.checkpoints.save import save
from gqaprune.cli import main
from gqaprune.commands.export import export
from gqaprune.common.console import console
from gqaprune.models.loading import load_model
from gqaprune.plan import PruningPlan

from cuts import UNEVEN, get_logits, make_plan, make_pruned, read_names
from tiny import make_model, make_tokenizer

TOKENIZER = make_tokenizer([("e", "d"), ("r", "u")])


@pytest.fixture
def pruned(tmp_path: Path) -> Path:
    """A checkpoint whose layers differ, with its plan."""
    plan = make_plan(make_model("llama", kv_heads=3, ratio=2), *UNEVEN)
    save(make_pruned("llama", UNEVEN), TOKENIZER, tmp_path / "pruned", plan)
    return tmp_path / "pruned"


@pytest.mark.parametrize("format", ["padded", "gguf-f16", "gguf-q8_0", "gguf-f16-padded", "gguf-q8_0-padded", "auto"])
def test_export_writes_the_same_model_with_plan_and_card(format: str, pruned: Path, tmp_path: Path) -> None:
    export(str(pruned), str(tmp_path / "out"), format)
    expected = get_logits(load_model(pruned))
    loaded = load_model(tmp_path / "out", dtype="float32")
    error = (get_logits(loaded) - expected).norm() / expected.norm()
    assert error < (0.15 if "q8_0" in format else 0.02 if "f16" in format else 1e-5)
    assert PruningPlan.load(tmp_path / "out/plan.json") == PruningPlan.load(pruned / "plan.json")
    assert "# a model, pruned" in (tmp_path / "out/README.md").read_text()


def test_export_says_what_padding_costs(pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console.quiet = False
    export(str(pruned), str(tmp_path / "out"), "padded")
    printed = capsys.readouterr().out
    assert "padded format, 0." in printed and "channels: 0.01 M parameters, 100%" in printed


def test_padded_checkpoint_is_exported_with_its_plan(pruned: Path, tmp_path: Path) -> None:
    export(str(pruned), str(tmp_path / "padded"), "padded")
    for _ in range(2):  # the second time over an earlier checkpoint
        export(str(tmp_path / "padded"), str(tmp_path / "half"), dtype="float16")
    assert PruningPlan.load(tmp_path / "half/plan.json") == PruningPlan.load(pruned / "plan.json")
    assert 'from_pretrained("half")' in (tmp_path / "half/README.md").read_text()


def test_exported_files_can_be_exported_again(pruned: Path, tmp_path: Path) -> None:
    export(str(pruned), str(tmp_path / "gguf"), "gguf-f16")
    export(str(tmp_path / "gguf/model-f16.gguf"), str(tmp_path / "back"), dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "back", trust_remote_code=True)
    torch.testing.assert_close(get_logits(plain), get_logits(load_model(pruned)), atol=0.05, rtol=0)
    assert "plan.json" not in read_names(tmp_path / "back")  # it is not what made these shapes


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["gqaprune", "export", *arguments])
    return main()


def test_command_exports(pruned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    assert run(monkeypatch, "--model", str(pruned), "--folder", str(out), "--format", "padded") == 0
    assert not load_model(out).config.is_heterogeneous


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--format", "stock"], "layers 0, 2 differ from 6 query heads, 3 KV heads and 20 channels; use per-layer"),
        (["--format", "pickle"], "format must be one of auto, stock"),
        (["--size", "3"], "gqaprune export --help` lists the settings"),
        (["--quantization", "int3"], "quantization must be one of int8, got 'int3'"),
    ],
)
def test_command_says_what_is_wrong_in_a_sentence(
    arguments: list[str],
    reason: str,
    pruned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, "--model", str(pruned), "--folder", str(tmp_path / "out"), *arguments) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("gqaprune: error: ") and reason in line
    assert read_names(tmp_path) == {"pruned"}


def test_weights_that_are_not_finite_are_not_exported(tmp_path: Path) -> None:
    model = make_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6
    save(model, make_tokenizer(), tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"weights of layer 1 \(model.layers.1.mlp.up_proj.weight\) contain NaN or infinite"
    ):
        export(str(tmp_path / "model"), str(tmp_path / "out"), dtype="float16")
    assert not (tmp_path / "out").exists()
