"""vLLM computes with every folder that we write, at its own size, what PyTorch does."""

from pathlib import Path
from typing import Any

import pytest
from asking import ANY_COUNTS, EQUAL_COUNTS, FIVE_SHAPES, WHOLE_ATTENTION, Case, ask, check, cut, cut_channels
from transformers import PreTrainedModel

import gqaprune
from gqaprune.surgery.cut import apply_plan

from cuts import make_plan


def cut_smollm() -> PreTrainedModel:
    """SmolLM2-135M without a third of its KV heads in some layers, and of its channels in all but the first."""
    model = gqaprune.load_model("smollm2-135m", dtype="float32")
    layers = range(model.config.num_hidden_layers)
    groups = [[0, 2] if layer % 3 == 1 else [0, 1, 2] for layer in layers]
    apply_plan(model, make_plan(model, groups, [list(range(1536 - 17 * layer)) for layer in layers]))
    return model


TRUSTED, BY_TRANSFORMERS = {"trust_remote_code": True}, {"model_impl": "transformers"}
CASES = {
    "llama": Case(lambda: cut("llama"), arguments=TRUSTED),
    "llama, biases": Case(lambda: cut("llama-biases"), arguments=TRUSTED),
    "llama of one KV head": Case(lambda: cut("llama", ([[0]] * 3, ANY_COUNTS[1]), kv_heads=1), arguments=TRUSTED),
    "qwen2, 7:1": Case(lambda: cut("qwen2", FIVE_SHAPES, ratio=7, kv_heads=4), arguments=TRUSTED),
    "qwen2, tied": Case(lambda: cut("qwen2-tied", ratio=7), arguments=TRUSTED),
    "qwen3": Case(lambda: cut("qwen3"), arguments=TRUSTED),
    "mistral": Case(lambda: cut("mistral"), arguments=TRUSTED),
    "mistral, sliding": Case(lambda: cut("mistral-sliding"), arguments=TRUSTED),
    "gemma2": Case(lambda: cut("gemma2"), arguments=TRUSTED),
    "gemma3": Case(lambda: cut("gemma3"), arguments=TRUSTED),
    "granite": Case(lambda: cut("granite"), arguments=TRUSTED),
    "exaone4": Case(lambda: cut("exaone4"), arguments=TRUSTED),
    "olmo2": Case(lambda: cut("olmo2", WHOLE_ATTENTION), arguments=TRUSTED),
    "phi3": Case(lambda: cut("phi3"), arguments=TRUSTED),
    "smollm3": Case(lambda: cut("smollm3"), arguments=TRUSTED),
    "smollm2": Case(cut_smollm, arguments=TRUSTED, tolerance=1e-3),
    "llama, stock": Case(lambda: cut("llama", EQUAL_COUNTS), "stock"),
    "qwen2, stock": Case(lambda: cut("qwen2", EQUAL_COUNTS, ratio=7), "stock", BY_TRANSFORMERS),
    "llama, padded": Case(lambda: cut("llama"), "padded"),
    "qwen2, padded": Case(lambda: cut("qwen2", ratio=7), "padded", BY_TRANSFORMERS),
    "llama, DeciLM": Case(lambda: cut_channels("llama"), "nemotron-nas", TRUSTED),
    "mistral, DeciLM": Case(lambda: cut_channels("mistral"), "nemotron-nas", TRUSTED),
    "qwen2, DeciLM": Case(lambda: cut_channels("qwen2", ratio=7), "nemotron-nas", TRUSTED),
    "qwen2, tied, DeciLM": Case(lambda: cut_channels("qwen2-tied"), "nemotron-nas", TRUSTED),
}
"""Name -> what vLLM is asked about; a family or a format is a line."""


@pytest.fixture(scope="module")
def answers(engines: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Name -> PyTorch's answer and vLLM's."""
    own = {**environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # several models in one process
    return ask(engines / "python", "ask_vllm.py", CASES, tmp_path_factory.mktemp("vllm"), own)


@pytest.mark.parametrize("name", CASES)
def test_vllm_computes_what_pytorch_does(name: str, answers: dict[str, Any]) -> None:
    check(CASES[name], *answers[name])


def test_keys_and_values_take_the_room_of_the_heads_that_are_left(answers: dict[str, Any]) -> None:
    """Of padded layers with 3 KV heads each, as many as 6 in all where the same layers keep 2, 1 and 3."""
    held = {name: answers[name][1]["cache"] for name in ("llama", "llama, padded")}
    assert held["llama"] > 1.3 * held["llama, padded"]
