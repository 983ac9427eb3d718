"""GGUF files: read back by transformers and by llama.cpp with the same logits and the same tokens."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gqaprune.checkpoints.gguf_writer import _SPLITS as SPLITS
from gqaprune.checkpoints.gguf_writer import _compute_rope_factors as compute_rope_factors
from gqaprune.checkpoints.gguf_writer import write_gguf
from gqaprune.checkpoints.save import save
from gqaprune.models.architecture import read_geometry
from gqaprune.models.loading import load, load_model
from gqaprune.surgery.cut import apply_plan

from cuts import get_logits, make_plan
from tiny import make_model, make_tokenizer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from formats import ask_llama_cpp

TOKENIZER = make_tokenizer([("e", "d"), ("r", "u")])
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def write(model: PreTrainedModel, file: Path, kind: str = "f16") -> Any:
    return write_gguf(file, model.config, model.state_dict(), TOKENIZER, kind)


def read(file: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)


def test_weights_are_expanded_on_loading_and_nothing_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(make_model(channels=32), tmp_path / "model.gguf", "q8_0")
    said: list[str] = []
    monkeypatch.setattr("transformers.quantizers.quantizer_gguf.logger.warning", said.append)
    model = load_model(tmp_path / "model.gguf", "bfloat16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} and not said
    model.save_pretrained(tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2", "qwen2-tied"])
@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 0.02), ("q8_0", 0.15)])
def test_models_are_read_back_with_logits_within_the_formats_rounding(
    variant: str, kind: str, tolerance: float, tmp_path: Path
) -> None:
    model = make_model(variant, kv_heads=4, ratio=4, head_dim=4 if "qwen2" in variant else 8)
    model.config.sliding_window = None
    apply_plan(model, make_plan(model, [[0, 1, 3], [2], [1]], [[3, 9], [1], list(range(20))]))
    geometry = write(model, tmp_path / "model.gguf", kind)
    loaded = read(tmp_path / "model.gguf")
    assert read_geometry(loaded.config).query_heads == geometry.query_heads == (16, 16, 16)
    assert geometry.channels == ((32,) * 3 if kind == "q8_0" else (20,) * 3)
    expected = get_logits(model)
    error = (get_logits(loaded) - expected).norm() / expected.norm()
    assert 0 < error < tolerance


@pytest.mark.parametrize(
    ("variant", "kind", "tolerance"),
    [
        ("llama", "f16", 0.02),
        ("llama", "q8_0", 0.3),
        ("llama-3.1", "f16", 0.02),
        ("mistral", "f16", 0.02),
        ("qwen2", "f16", 0.02),
        ("qwen2-tied", "f16", 0.02),
    ],
)
def test_llama_cpp_reads_the_same_model_and_the_same_tokens(
    variant: str, kind: str, tolerance: float, tmp_path: Path
) -> None:
    model = make_model(variant.removesuffix("-3.1"), kv_heads=4, ratio=4, head_dim=4 if "qwen2" in variant else 8)
    if variant == "llama-3.1":
        model.config.rope_parameters = LLAMA_3_ROPE
        model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
    model.resize_token_embeddings(len(TOKENIZER))
    model.config.sliding_window = None
    apply_plan(model, make_plan(model, [[0, 1, 3], [2], [1]], [[3, 9], [1], list(range(20))]))
    write(model, tmp_path / "model.gguf", kind)
    prompts = ["Pruned: 1234 heads", "  def f(x):\n\treturn 'x'", "x" * 40 + " ran the editor"]
    for prompt, (count, likeliest) in zip(prompts, ask_llama_cpp(tmp_path / "model.gguf", prompts), strict=True):
        ids = TOKENIZER(prompt, return_tensors="pt")["input_ids"]
        assert count == ids.shape[1]
        expected = model(ids).logits[0, -1].log_softmax(-1)
        assert len(likeliest) == 20
        for token, log_probability in likeliest:
            assert log_probability == pytest.approx(expected[token].item(), abs=tolerance)


def test_llamas_saved_as_mistrals_are_written_as_llamas_again(tmp_path: Path) -> None:
    model = make_model("llama", kv_heads=4, ratio=4)  # width 64, which 12 heads do not divide
    apply_plan(model, make_plan(model, [[0, 1, 3]] * 3, [list(range(20))] * 3))
    save(model, make_tokenizer(), tmp_path / "stock")
    stock = load_model(tmp_path / "stock")
    assert stock.config.model_type == "mistral"
    assert write(stock, tmp_path / "model.gguf").kv_heads == (4, 4, 4)
    loaded = read(tmp_path / "model.gguf")
    assert loaded.config.model_type == "llama"
    torch.testing.assert_close(get_logits(loaded), get_logits(model), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("split", ["plain", "digits", "llama3", "qwen2"])
def test_byte_level_tokenizers_read_text_as_before(split: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer([("e", "d"), ("1", "2"), ("12", "3")])
    patterns = dict(zip(("llama3", "qwen2"), SPLITS, strict=True))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split in ("plain", "digits"))
    first = {"plain": [], "digits": [pre_tokenizers.Digits(individual_digits=True)]}.get(split)
    if first is None:
        first = [pre_tokenizers.Split(Regex(patterns[split]), behavior="isolated")]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level]) if first else byte_level
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    model = make_model("llama")
    model.resize_token_embeddings(300)
    if split == "digits":  # which transformers' reader does not know
        with pytest.raises(ValueError, match="the tokenizer would read text in another way from the GGUF file"):
            write_gguf(tmp_path / "model.gguf", model.config, model.state_dict(), tokenizer)
        return
    write_gguf(tmp_path / "model.gguf", model.config, model.state_dict(), tokenizer)
    written = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    for text in ("Pruned: 1234 heads, it's</s> 漢字 naïve", "  def f(x):\n\n\treturn 'x'  "):
        assert written(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert written.chat_template == tokenizer.chat_template
    assert (written.bos_token, written.eos_token) == ("<s>", "</s>")


@pytest.mark.parametrize("split", ["gpt-2", "llama-bpe"])
def test_a_file_with_an_embedding_for_each_token_and_no_more_is_loaded_with_its_own_tokens(
    split: str, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer([("e", "d"), ("r", "u")])
    if split == "llama-bpe":
        pattern = next(pattern for pattern, name in SPLITS.items() if name == split)
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    model = make_model()
    assert model.config.vocab_size == len(tokenizer)
    save(model, tokenizer, tmp_path, format="gguf-f16")
    _, loaded = load(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    text = "It ran.<|endoftext|></s>"
    assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_scaled_rotary_frequencies_are_those_of_llama_3(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(head_dim=64, rope_parameters=rope | {"original_max_position_embeddings": 8192})
    plain = LlamaConfig(head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    scaled, unscaled = (LlamaRotaryEmbedding(each).inv_freq for each in (config, plain))
    torch.testing.assert_close(unscaled / compute_rope_factors(config.rope_parameters, 64), scaled)


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ("qwen3", "GGUF export knows llama, mistral, qwen2 models, got 'qwen3'"),
        ("llama-biases", "a GGUF file of a llama model has no place for its biases"),
        ("mistral-sliding", "a GGUF file of a mistral model has no place for sliding windows"),
    ],
)
def test_what_the_format_has_no_place_for_is_refused(variant: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        write(make_model(variant), tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_weights_too_large_for_float16_are_refused(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds values that float16 cannot"):
        write(model, tmp_path / "model.gguf")
