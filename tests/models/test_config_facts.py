"""A head that differs from the embedding keeps its values, whatever the config says, and so does one that does not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from gqaprune.checkpoints.save import save
from gqaprune.models.config_facts import correct_config
from gqaprune.models.loading import load_model
from gqaprune.placement.loading_by_layer import load_offloaded_model
from gqaprune.surgery.cut import apply_plan

from cuts import UNEVEN, get_logits, make_plan
from tiny import make_model, make_tokenizer

FORMATS = ["stock", "per-layer", "padded", "gguf-f16"]
TOKENIZER = make_tokenizer([("e", "d"), ("r", "u")])


def make_tied(format: str) -> PreTrainedModel:
    """A model whose config ties its head, with layers that differ where the format is for such."""
    model = make_model("llama", kv_heads=3, ratio=2, head_dim=None)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    if format != "stock":
        apply_plan(model, make_plan(model, *UNEVEN))
    return model


def check_saved(model: PreTrainedModel, format: str, folder: Path, is_tied: bool) -> None:
    """What is written and loaded computes the same, in plain transformers too, and its config tells the truth."""
    expected = get_logits(model)
    assert save(model, TOKENIZER, folder, format=format) == format
    loaded = [load_model(folder)]
    if format != "gguf-f16":
        loaded.append(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True))
    for one in loaded:
        assert one.config.tie_word_embeddings is is_tied
        assert (one.get_output_embeddings().weight is one.get_input_embeddings().weight) is is_tied
        torch.testing.assert_close(get_logits(one), expected, atol=0.05 if format == "gguf-f16" else 1e-4, rtol=0)


@pytest.mark.parametrize("format", FORMATS)
def test_a_trained_head_in_the_files_of_a_tied_config_is_kept(format: str, tmp_path: Path) -> None:
    save(make_tied(format), None, tmp_path / "dense")
    file = tmp_path / "dense/model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, file, {"format": "pt"})
    model = load_model(tmp_path / "dense")
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"]) and not model.config.tie_word_embeddings
    check_saved(model, format, tmp_path / "out", is_tied=False)
    if format in ("stock", "per-layer"):
        offloaded = load_offloaded_model(tmp_path / "dense", tmp_path / "work")
        assert not offloaded.config.tie_word_embeddings
        save(offloaded, None, tmp_path / "by-layer", format=format)
        assert torch.equal(get_logits(load_model(tmp_path / "by-layer")), get_logits(model))


@pytest.mark.parametrize("format", FORMATS)
def test_a_head_untied_by_hand_is_kept(format: str, tmp_path: Path) -> None:
    model = make_tied(format)
    model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight))
    check_saved(model, format, tmp_path / "out", is_tied=False)


@pytest.mark.parametrize("format", FORMATS)
def test_a_head_tied_by_hand_is_written_as_tied(format: str, tmp_path: Path) -> None:
    model = make_tied(format)
    model.config.tie_word_embeddings = False
    check_saved(model, format, tmp_path / "out", is_tied=True)


def test_equal_tensors_stay_two_unless_the_config_ties_them() -> None:
    model = make_tied("stock")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    for is_tied in (True, False):
        model.config.tie_word_embeddings = is_tied
        correct_config(model)
        assert model.config.tie_word_embeddings is is_tied
