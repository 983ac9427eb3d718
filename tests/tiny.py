"""Tiny random models of every supported family, and a byte tokenizer."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Exaone4Config,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

from gqaprune import PruningConfig
from gqaprune.models.loading import build_model

VOCABULARY = 260
CONFIGS: dict[str, type[Any]] = {
    "exaone4": Exaone4Config,
    "gemma2": Gemma2Config,
    "gemma3": Gemma3TextConfig,
    "granite": GraniteConfig,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "mixtral": MixtralConfig,
    "olmo2": Olmo2Config,
    "olmo3": Olmo3Config,
    "phi3": Phi3Config,
    "qwen2": Qwen2Config,
    "qwen2_moe": Qwen2MoeConfig,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoeConfig,
    "smollm3": SmolLM3Config,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-biases": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "mistral-sliding": {"sliding_window": 5},
    "qwen2": {},
    "qwen2-sliding": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen2-tied": {"tie_word_embeddings": True},
    "qwen3": {},
    "gemma2": {"sliding_window": 5, "query_pre_attn_scalar": 6, "attention_bias": True},
    "gemma3": {"sliding_window": 5, "sliding_window_pattern": 2, "query_pre_attn_scalar": 6},
    "granite": {
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.4,
        "logits_scaling": 1.5,
    },
    "exaone4": {"sliding_window": 5, "sliding_window_pattern": 2},
    "smollm3": {"no_rope_layer_interval": 2, "mlp_bias": True},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 12,
    },
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
}
"""Families and their variations: biases, q/k norms, norms of outputs, tied embeddings, sliding windows, fused rows."""
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 5e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""Rotary frequencies scaled as those of Llama 3.1."""
WHOLE_ATTENTION: dict[str, dict[str, Any]] = {"olmo2": {}, "olmo3": {"sliding_window": 5}}
"""Families that lose MLP channels only."""
WHOLE_MLP: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12},
}
"""Families that lose GQA groups only."""

PLAIN: dict[str, Any] = {
    "criterion": "fisher",
    "split": "free",
    "allocation": "uniform",
    "damage": "scores",
    "repair": {"method": "none"},
}
"""One criterion and the cut alone, so that a test sees what it is about."""


DATA: dict[str, Any] = {
    "calibration": {"windows": 8, "window": 32, "batch_size": 2},
    "training": {"window": 32, "tokens": 1024},
    "evaluation": {"window": 32, "tokens": 512, "batch_size": 4},
}
"""Streams of a run that takes seconds."""


def merge_settings(*layers: dict[str, Any]) -> dict[str, Any]:
    """Settings of which later ones override earlier ones, group by group."""
    merged: dict[str, Any] = {}
    for layer in layers:
        for name, value in layer.items():
            is_group = isinstance(value, dict) and isinstance(merged.get(name), dict)
            merged[name] = {**merged[name], **value} if is_group else value
    return merged


def make_plain(**settings: Any) -> PruningConfig:
    """A config of one criterion and the cut alone."""
    return PruningConfig(**merge_settings(PLAIN, settings))


def make_model(
    variant: str = "llama",
    *,
    kv_heads: int = 2,
    ratio: int = 3,
    head_dim: int | None = 8,
    channels: int = 20,
    layers: int = 3,
    seed: int = 0,
) -> PreTrainedModel:
    """A tiny random model in float32; biases and norms are random too, so that a wrong row shows.

    Without `head_dim` it follows from width and heads (4), as in configs that do not name it.
    """
    heads = kv_heads * ratio
    config = CONFIGS[variant.split("-")[0]](
        vocab_size=VOCABULARY,
        hidden_size=4 * heads,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=channels,
        num_hidden_layers=layers,
        max_position_embeddings=256,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
        **({} if head_dim is None else {"head_dim": head_dim}),
        **({"shared_expert_intermediate_size": channels} if variant == "qwen2_moe" else {}),
        **(VARIANTS | WHOLE_ATTENTION | WHOLE_MLP)[variant],
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2)
            if "norm" in name and not variant.startswith("gemma"):  # which adds the 1 itself
                parameter.add_(1.0)
    return model


def rebuild(model: PreTrainedModel, std: float = 0.2, **settings: Any) -> PreTrainedModel:
    """A model with other settings and random weights, biases and norms among them."""
    for name, value in settings.items():
        setattr(model.config, name, value)
    torch.manual_seed(0)
    rebuilt = build_model(model.config, torch.float32).eval()
    with torch.no_grad():
        for name, parameter in rebuilt.named_parameters():
            parameter.normal_(std=std).add_(1.0 if "norm" in name else 0.0)
    return rebuilt


def copy_with_context(source: Path, folder: Path, tokens: int = 4096) -> Path:
    """A copy of a checkpoint that stands for a real model: it reads windows of the default sizes."""
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": tokens}))
    return folder


def make_tokenizer(merges: Sequence[tuple[str, str]] = (), adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, one per merge, and two special ones, 258 without merges; `<s>` may begin every text."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(merge) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        first = ("<s>", len(symbols))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[first])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def round_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Round a model's weights to what float16 holds; they stay float32."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.half())
    return model


def make_tokens(batch: int = 2, length: int = 16, seed: int = 0) -> torch.Tensor:
    """Random token ids `[batch, length]`."""
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message.role + ': ' + message.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
"""Turns as `role: content`, one per line."""


def make_counting_model(step: int) -> PreTrainedModel:
    """A model whose likeliest next token is the last one plus `step`, modulo 256: 0 says the last one for ever."""
    model = make_model("llama")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.model.norm.weight.fill_(1.0)
        directions = torch.nn.functional.normalize(model.model.embed_tokens.weight[:256], dim=1)
        model.lm_head.weight.zero_()
        model.lm_head.weight[:256] = 4 * directions.roll(step, 0)
    return model


_TEXT = "It was the best of times , it was the worst of times , and nobody knew which until much later"
PROSE = _TEXT.split()
"""Words that repeat no more than English does."""
SENTENCE = ["boil", "an", "egg", "in", "water"]


def train_model(model: PreTrainedModel, windows: torch.Tensor, steps: int = 60) -> PreTrainedModel:
    """Teach a tiny model some windows, all at once in each step, so that it has something to lose."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        model(windows, labels=windows).loss.backward()
        optimizer.step()
    return model


def make_pattern(batch: int = 4, length: int = 24) -> torch.Tensor:
    """Token ids `[batch, length]` that a model can learn: each follows from the one before."""
    tokens = [torch.arange(batch) * 7 % 64]
    for _ in range(length - 1):
        tokens.append((5 * tokens[-1] + 3) % 64)
    return torch.stack(tokens, dim=1)


def make_unknown(family: str, **settings: Any) -> PreTrainedModel:
    shapes = {"hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
    sizes = {"vocab_size": 260, "intermediate_size": 20, "num_hidden_layers": 3, "max_position_embeddings": 64}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**shapes, **sizes, **tokens, **settings}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model.eval()
