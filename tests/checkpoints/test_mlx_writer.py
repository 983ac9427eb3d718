"""The format mlx: what transformers loads, and what mlx-lm builds it with; tests/engines reads it there."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from gqaprune import save
from gqaprune.commands.export import export
from gqaprune.models.loading import load_model

from cuts import EVEN, UNEVEN, get_logits, make_pruned, read_names
from tiny import make_model, make_tokenizer, rebuild


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


@pytest.mark.parametrize("kept", [EVEN, UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize(("variant", "module"), [("llama-biases", "llama"), ("qwen2", "llama"), ("qwen3", "qwen3")])
def test_config_names_a_file_on_the_family_of_mlx_lm_and_all_else_stays(
    variant: str, module: str, kept: tuple[list[list[int]], list[list[int]]], tmp_path: Path
) -> None:
    model = make_pruned(variant, kept)
    save(model, None, tmp_path / "auto")
    save(model, None, tmp_path / "mlx", format="mlx")
    config = read_config(tmp_path / "mlx")
    source = (tmp_path / "mlx" / config.pop("model_file")).read_text()
    assert {"ModelArgs", "Model"} <= {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    assert f"from mlx_lm.models import {module} as family\n" in source and source.endswith("\n")
    assert config == read_config(tmp_path / "auto")
    assert read_names(tmp_path / "mlx") == {*read_names(tmp_path / "auto"), "modeling_mlx.py"}
    for loaded in (
        load_model(tmp_path / "mlx"),
        AutoModelForCausalLM.from_pretrained(tmp_path / "mlx", trust_remote_code=True),
    ):
        assert torch.equal(get_logits(loaded), get_logits(model))


@pytest.mark.parametrize(
    ("variant", "sentence"),
    [
        ("mistral-sliding", "cannot store sliding windows; use per-layer"),
        ("gemma2", "mlx supports llama, mistral, qwen2, qwen3 models, got 'gemma2'"),
    ],
)
def test_model_that_mlx_lm_would_misread_is_refused(variant: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        save(make_pruned(variant, UNEVEN), None, tmp_path / "out", format="mlx")


def test_qwen3_with_biases_is_refused(tmp_path: Path) -> None:
    model = rebuild(make_model("qwen3"), attention_bias=True)
    with pytest.raises(ValueError, match="cannot store its biases"):
        save(model, None, tmp_path / "out", format="mlx")


@pytest.mark.parametrize("format", ["per-layer", "padded", "mlx"])
def test_other_formats_do_not_name_the_file(format: str, tmp_path: Path) -> None:
    save(make_pruned("llama", UNEVEN), make_tokenizer(), tmp_path / "out", format="mlx")
    export(str(tmp_path / "out"), str(tmp_path / "again"), format=format)
    assert ("model_file" in read_config(tmp_path / "again")) == (format == "mlx")
