"""GGUF files: read back by gqaprune, llama.cpp and, if padded, transformers with the same logits and tokens."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from gqaprune.checkpoints.gguf_writer import _compute_rope_factors as compute_rope_factors
from gqaprune.checkpoints.gguf_writer import find_gguf_shapes, write_gguf
from gqaprune.checkpoints.save import save
from gqaprune.models.architecture import read_geometry
from gqaprune.models.gguf_file import GgufHeader, read_header
from gqaprune.models.gguf_layout import pack_tensors
from gqaprune.models.loading import load_model
from gqaprune.surgery.cut import apply_plan

from cuts import EVEN, get_logits, make_plan
from tiny import make_model, make_tokenizer, round_weights

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from formats import ask_llama_cpp, continue_with_llama_cpp

TOKENIZER = make_tokenizer([("e", "d"), ("r", "u")])
PROMPTS = ["Pruned: 1234 heads", "  def f(x):\n\treturn 'x'", "x" * 40 + " ran the editor"]
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
UNEQUAL = ([[0, 1, 3], [2], [1]], [[3, 9], [1], list(range(20))])
FIVE_SHAPES = (
    [[0, 1, 3], [2], [1, 2], [0, 1, 2, 3], [0, 3]],
    [[3, 9], [1], list(range(20)), list(range(5)), list(range(9))],
)


@dataclass(frozen=True)
class Case:
    """A pruned model and the architecture that holds it."""

    variant: str
    architecture: str
    kept: tuple[Any, ...] = UNEQUAL
    sizes: dict[str, Any] = field(default_factory=lambda: {"kv_heads": 4, "ratio": 4})
    has_scaled_rope: bool = False
    is_tied: bool = False

    def make(self) -> PreTrainedModel:
        """The model, with an embedding for each token, and weights that float16 holds."""
        model = make_model(self.variant, **self.sizes)
        if self.has_scaled_rope:
            model.config.rope_parameters = LLAMA_3_ROPE
            model.model.rotary_emb = LlamaRotaryEmbedding(model.config)
        if self.is_tied:
            model.config.tie_word_embeddings = True
            model.tie_weights()
        model.resize_token_embeddings(len(TOKENIZER))
        model.config.sliding_window = None
        apply_plan(model, make_plan(model, *self.kept))
        return round_weights(model)


CASES = {
    "llama": Case("llama", "deci"),
    "llama 3:1": Case("llama", "deci", sizes={"kv_heads": 4, "ratio": 3}),
    "llama, one KV head": Case("llama", "deci", ([[0]] * 3, UNEQUAL[1]), {"kv_heads": 1, "ratio": 6}),
    "llama, fewer queries": Case(
        "llama", "deci", ([[0]] * 3, UNEQUAL[1], [[0, 1], [2], None]), {"kv_heads": 1, "ratio": 6}
    ),
    "llama 3.1": Case("llama", "deci", has_scaled_rope=True),
    "mistral": Case("mistral", "deci"),
    "qwen2 7:1": Case("qwen2", "deci", FIVE_SHAPES, {"kv_heads": 4, "ratio": 7, "layers": 5}),
    "qwen2, tied": Case("qwen2-tied", "deci"),
    "qwen2, scaled": Case("qwen2", "deci", has_scaled_rope=True),
    "qwen3, tied": Case("qwen3", "openelm", is_tied=True),
    "qwen3, padded": Case("qwen3", "qwen3"),
    "llama, equal": Case("llama", "llama", EVEN, {"kv_heads": 3, "ratio": 4}),
    "llama 3.1, equal": Case("llama", "llama", EVEN, {"kv_heads": 3, "ratio": 4}, has_scaled_rope=True),
    "mistral, equal": Case("mistral", "llama", EVEN, {"kv_heads": 3, "ratio": 4}),
    "qwen2, equal": Case("qwen2", "qwen2", EVEN, {"kv_heads": 4, "ratio": 3}),  # 6 heads of 8 fill the width of 48
    "qwen2, fewer heads": Case("qwen2", "deci", EVEN, {"kv_heads": 3, "ratio": 4}),
    "qwen2, equal, scaled": Case("qwen2", "deci", EVEN, {"kv_heads": 4, "ratio": 3}, has_scaled_rope=True),
    "qwen3, equal": Case("qwen3", "qwen3", EVEN, {"kv_heads": 3, "ratio": 4}),
}


def write(model: PreTrainedModel, file: Path, kind: str = "f16", is_padded: bool = False) -> Any:
    return write_gguf(file, model.config, model.state_dict(), TOKENIZER, kind, is_padded=is_padded)


def read(file: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)


def measure_error(loaded: PreTrainedModel, model: PreTrainedModel) -> float:
    expected = get_logits(model)
    return ((get_logits(loaded) - expected).norm() / expected.norm()).item()


def count_values(header: GgufHeader) -> int:
    return sum(torch.Size(stored.shape).numel() for stored in header.tensors.values())


@pytest.mark.parametrize("name", list(CASES))
def test_every_layer_is_written_and_read_at_its_own_size(name: str, tmp_path: Path) -> None:
    case, file = CASES[name], tmp_path / "model.gguf"
    model = case.make()
    written, header = write(model, file), read_header(file)
    assert header.metadata["general.architecture"] == case.architecture
    assert written == find_gguf_shapes(model.config)
    loaded = load_model(file)
    assert read_geometry(loaded.config) == written
    assert measure_error(loaded, model) < 1e-6
    if name != "qwen3, padded":
        assert written == read_geometry(model.config)
        extra = 4 if case.has_scaled_rope else 0  # factors of frequencies
        assert count_values(header) == sum(parameter.numel() for parameter in model.parameters()) + extra
    for key, counts in (("attention.head_count", written.query_heads), ("feed_forward_length", written.channels)):
        is_list = case.architecture in ("deci", "openelm")
        assert header.metadata[f"{case.architecture}.{key}"] == (list(counts) if is_list else counts[0])


@pytest.mark.parametrize("name", list(CASES))
def test_llama_cpp_reads_the_same_model_and_the_same_tokens(name: str, tmp_path: Path) -> None:
    model = CASES[name].make()
    write(model, tmp_path / "model.gguf")
    check_llama_cpp(model, tmp_path / "model.gguf", 0.02)


@pytest.mark.parametrize("name", ["llama", "qwen2 7:1", "qwen3, tied"])
def test_llama_cpp_reads_8_bits_of_unequal_layers(name: str, tmp_path: Path) -> None:
    model = CASES[name].make()
    write(model, tmp_path / "model.gguf", "q8_0")
    check_llama_cpp(model, tmp_path / "model.gguf", 0.3)


def check_llama_cpp(model: PreTrainedModel, file: Path, tolerance: float) -> None:
    for prompt, (count, likeliest) in zip(PROMPTS, ask_llama_cpp(file, PROMPTS), strict=True):
        ids = TOKENIZER(prompt, return_tensors="pt")["input_ids"]
        assert count == ids.shape[1]
        expected = model(ids).logits[0, -1].log_softmax(-1)
        assert len(likeliest) == 20
        for token, log_probability in likeliest:
            assert log_probability == pytest.approx(expected[token].item(), abs=tolerance)


@pytest.mark.parametrize("name", ["llama", "qwen2 7:1", "qwen3, tied"])
def test_llama_cpp_writes_the_same_text(name: str, tmp_path: Path) -> None:
    model = CASES[name].make()
    write(model, tmp_path / "model.gguf")
    letters = {TOKENIZER.convert_tokens_to_ids(letter) for letter in "abcdefghijklmnopqrstuvwxyz"}
    banned = sorted(set(range(len(TOKENIZER))) - letters)  # so that whatever is written is text
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, suppress_tokens=banned)
    for prompt, text in zip(
        PROMPTS, continue_with_llama_cpp(tmp_path / "model.gguf", PROMPTS, 12, banned), strict=True
    ):
        ids = TOKENIZER(prompt, return_tensors="pt")["input_ids"]
        assert TOKENIZER.decode(model.generate(ids, generation_config=settings)[0, ids.shape[1] :]) == text


@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2", "qwen2-tied"])
@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 0.02), ("q8_0", 0.15)])
def test_padded_models_are_read_by_transformers_with_logits_within_the_formats_rounding(
    variant: str, kind: str, tolerance: float, tmp_path: Path
) -> None:
    model = make_model(variant, kv_heads=4, ratio=4, head_dim=4 if "qwen2" in variant else 8)
    model.config.sliding_window = None
    apply_plan(model, make_plan(model, *UNEQUAL))
    geometry = write(model, tmp_path / "model.gguf", kind, is_padded=True)
    loaded = read(tmp_path / "model.gguf")
    assert read_geometry(loaded.config).query_heads == geometry.query_heads == (16, 16, 16)
    assert geometry.channels == ((32,) * 3 if kind == "q8_0" else (20,) * 3)
    assert 0 < measure_error(loaded, model) < tolerance
    assert torch.equal(get_logits(load_model(tmp_path / "model.gguf")), get_logits(loaded))


def test_8_bits_round_the_width_of_each_layer_and_loading_drops_the_zeros(tmp_path: Path) -> None:
    model = make_model("llama", kv_heads=4, ratio=4, channels=70)
    apply_plan(model, make_plan(model, UNEQUAL[0], [[3], list(range(40)), list(range(64))]))
    assert write(model, tmp_path / "model.gguf", "q8_0").channels == (32, 64, 64)
    loaded = load_model(tmp_path / "model.gguf")
    assert read_geometry(loaded.config) == read_geometry(model.config)
    assert 0 < measure_error(loaded, model) < 0.15


def test_the_head_is_dropped_only_where_it_is_the_embedding(tmp_path: Path) -> None:
    model = make_model("qwen2")
    model.config.tie_word_embeddings = True  # which its weights are not
    write(model, tmp_path / "other.gguf")
    assert "output.weight" in read_header(tmp_path / "other.gguf").tensors
    model.config.tie_word_embeddings = False
    assert measure_error(load_model(tmp_path / "other.gguf"), model) < 0.003
    with torch.no_grad():
        model.lm_head.weight.copy_(model.model.embed_tokens.weight)
    write(model, tmp_path / "same.gguf")
    assert "output.weight" not in read_header(tmp_path / "same.gguf").tensors
    assert measure_error(load_model(tmp_path / "same.gguf"), model) < 0.003


@pytest.mark.parametrize("fault", ["values", "rows", "missing"])
def test_what_was_written_wrong_is_found_by_reading_it_back(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pack(*arguments: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in pack_tensors(*arguments):
            if name != "blk.1.ffn_up.weight":
                yield name, tensor
            elif fault != "missing":
                yield name, tensor.roll(1, 1) if fault == "values" else tensor.repeat(40, 1)

    monkeypatch.setattr("gqaprune.checkpoints.gguf_writer.pack_tensors", pack)
    reason = (
        "model.gguf lacks model.layers.1.mlp.up" if fault == "missing" else "differs from the model: export it again"
    )
    with pytest.raises(ValueError, match=reason):
        write(CASES["llama"].make(), tmp_path / "model.gguf")


def test_llamas_saved_as_mistrals_are_written_as_llamas_again(tmp_path: Path) -> None:
    model = make_model("llama", kv_heads=4, ratio=4)  # width 64, which 12 heads do not divide
    apply_plan(model, make_plan(model, [[0, 1, 3]] * 3, [list(range(20))] * 3))
    save(model, make_tokenizer(), tmp_path / "stock")
    stock = load_model(tmp_path / "stock")
    assert stock.config.model_type == "mistral"
    assert write(stock, tmp_path / "own.gguf").kv_heads == (3, 3, 3)
    assert write(stock, tmp_path / "model.gguf", is_padded=True).kv_heads == (4, 4, 4)
    loaded = read(tmp_path / "model.gguf")
    assert loaded.config.model_type == "llama"
    torch.testing.assert_close(get_logits(loaded), get_logits(model), atol=0.05, rtol=0.05)


def test_scaled_rotary_frequencies_are_those_of_llama_3(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(head_dim=64, rope_parameters=rope | {"original_max_position_embeddings": 8192})
    plain = LlamaConfig(head_dim=64, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    scaled, unscaled = (LlamaRotaryEmbedding(each).inv_freq for each in (config, plain))
    torch.testing.assert_close(unscaled / compute_rope_factors(config.rope_parameters, 64), scaled)


@pytest.mark.parametrize(
    ("variant", "is_padded", "reason"),
    [
        ("granite", False, "GGUF export supports llama, mistral, qwen2, qwen3 models, got 'granite'"),
        ("qwen3", True, "GGUF export supports llama, mistral, qwen2 models, got 'qwen3'"),
        ("llama-biases", False, "a GGUF file of a llama model cannot store its biases"),
        ("mistral-sliding", False, "a GGUF file of a mistral model cannot store sliding windows"),
    ],
)
def test_what_the_format_has_no_place_for_is_refused(
    variant: str, is_padded: bool, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=reason):
        write(make_model(variant), tmp_path / "model.gguf", is_padded=is_padded)
    assert not list(tmp_path.iterdir())


def test_scaled_rope_and_activations_that_an_architecture_does_not_compute_are_refused(tmp_path: Path) -> None:
    qwen, llama = make_model("qwen3"), make_model("llama")
    qwen.config.rope_parameters, llama.config.hidden_act = LLAMA_3_ROPE, "gelu"
    for model, reason in ((qwen, "rope of type 'llama3'"), (llama, "the activation 'gelu'")):
        with pytest.raises(ValueError, match=f"cannot store {reason}; use padded"):
            write(model, tmp_path / "model.gguf")


def test_weights_too_large_for_float16_are_refused(tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has values that are too large"):
        write(model, tmp_path / "model.gguf")
