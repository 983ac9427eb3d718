"""Correct what a config says about its model's weights and code."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from gqaprune.models.per_layer import MODELING_FILE
from gqaprune.models.wrapping import unwrap_name

_LOCAL_ATTENTION = (None, "eager", "flex_attention", "sdpa")
_LOCAL_EXPERTS = (None, "batched_mm", "eager", "grouped_mm")
"""Implementations that are part of torch and transformers."""


def correct_config(model: PreTrainedModel, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Correct whether a model's config says that its head is tied, its weights are quantised and it has its own code.

    transformers loads a head that differs from the embedding, whatever the config says, and leaves the config wrong.
    Two tensors with the same values count as one only if the config says so.

    Args:
        model: the causal LM.
        state_dict: its whole weights, if the model's may be sharded.
    """
    _mark_tied_head(model, model.state_dict() if state_dict is None else state_dict)
    drop_code_map(model.config, model.is_remote_code())
    model.config.__dict__.pop("_model_name_or_path", None)  # transformers' name for what a GGUF file calls itself
    if getattr(model, "hf_quantizer", None) is None and hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights have been dequantised


def drop_code_map(config: PretrainedConfig, is_trusted: bool) -> None:
    """Remove the map of a model's code files if classes of transformers, or of this package, are used instead."""
    if not is_trusted or f"{Path(MODELING_FILE).stem}." in str(getattr(config, "auto_map", "")):
        config.__dict__.pop("auto_map", None)


def drop_kernels(config: PretrainedConfig) -> None:
    """Remove kernels of attention and experts that a config names and transformers would download from the hub."""
    for part in (config, config.get_text_config()):
        if part._attn_implementation not in _LOCAL_ATTENTION:
            part._attn_implementation = None
        if part._experts_implementation not in _LOCAL_EXPERTS:
            part._experts_implementation = None


def check_kernel(attn_implementation: str | None, trust_remote_code: bool) -> None:
    """Raise an error for an attention kernel on the hub, which is code, unless remote code is trusted.

    Raises:
        ValueError: with the kernels to use instead.
    """
    if "/" in (attn_implementation or "") and not trust_remote_code:
        raise ValueError(
            f"attn_implementation {attn_implementation} is code on the hub: set trust_remote_code to true to run it, "
            "or use sdpa or eager"
        )


def has_own_code(config: PretrainedConfig) -> bool:
    """Return whether a model's classes came with it and the user has trusted them, instead of transformers'."""
    return not type(config).__module__.startswith("transformers.") or hasattr(config, "auto_map")


def _mark_tied_head(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    names = {module: f"{unwrap_name(name)}.weight" for name, module in model.named_modules() if module in ends}
    embedding, head = (weights.get(names.get(module, "")) for module in ends)
    if embedding is None or head is None:
        return
    is_shared = embedding.shape == head.shape and embedding.data_ptr() == head.data_ptr()
    is_tied = getattr(model.config, "tie_word_embeddings", False)
    model.config.tie_word_embeddings = is_shared or (is_tied and torch.equal(embedding, head))
