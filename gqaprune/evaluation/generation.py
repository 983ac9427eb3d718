"""Continue prompts greedily, one at a time, and measure how likely a model finds a text."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from gqaprune.data.call_checks import check_ids
from gqaprune.models.architecture import read_context
from gqaprune.models.losses import IGNORED, average_losses, measure_losses


@torch.inference_mode()
def continue_greedily(model: PreTrainedModel, ids_1T: Tensor, max_new_tokens: int) -> Tensor:
    """Continue a prompt; return prompt and continuation as token ids `[1, tokens]`, with any end-of-text token.

    Each token is the likeliest one, whatever the model's generation config asks of `generate` (beams, penalties, stop
    words); the config is only used for the end-of-text tokens.

    Args:
        model: the causal LM, whole on one device.
        ids_1T: the prompt.
        max_new_tokens: largest number of tokens to add; fewer if the model's context is full.

    Raises:
        ValueError: if the prompt is empty, fills the context or has ids that the model does not embed.
    """
    context, ends = read_context(model.config), list_ends(model)
    check_ids(model, ids_1T, "a prompt")
    check_prompt(ids_1T, context)
    cache, new_1T = DynamicCache(config=model.config), ids_1T
    for _ in range(min(max_new_tokens, context - ids_1T.shape[1])):
        logits_1V = model(input_ids=new_1T, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        new_1T = logits_1V.argmax(-1, keepdim=True)
        ids_1T = torch.cat([ids_1T, new_1T], dim=1)
        if int(new_1T) in ends:
            break
    return ids_1T


def check_prompt(ids_1T: Tensor, context: int) -> None:
    """Raise an error if a prompt is empty or leaves no room for a continuation.

    Raises:
        ValueError: with its tokens and the context.
    """
    if not (tokens := ids_1T.shape[1]):
        raise ValueError("a prompt has no tokens: give it at least one word")
    if tokens >= context:
        raise ValueError(
            f"a prompt has {tokens:,} tokens, but the model's context is {context:,}: give a shorter prompt"
        )


def list_ends(model: PreTrainedModel) -> list[int]:
    """List the tokens that end a text: those of the generation config, else of the config."""
    configs = (model.generation_config, model.config)
    ends: list[Any] = [config.eos_token_id for config in configs if getattr(config, "eos_token_id", None) is not None]
    return ends[0] if ends and isinstance(ends[0], list) else ends[:1]


def split_continuation(model: PreTrainedModel, ids_1T: Tensor, prompt_tokens: int) -> tuple[list[int], bool]:
    """Return the tokens that a model added to a prompt, and whether an end-of-text token, left out here, ended them."""
    added = ids_1T[0, prompt_tokens:].tolist()
    is_ended = bool(added) and added[-1] in list_ends(model)
    return added[: len(added) - is_ended], is_ended


@torch.inference_mode()
def measure_text_perplexity(model: PreTrainedModel, ids_1T: Tensor, prompt_tokens: int) -> float:
    """Measure the perplexity of a continuation after its prompt, the end-of-text token included.

    Args:
        model: the causal LM that judges.
        ids_1T: prompt and continuation.
        prompt_tokens: number of tokens of the prompt, at least 1.

    Raises:
        ValueError: if it is not a finite number.
    """
    labels = ids_1T.clone()
    labels[:, :prompt_tokens] = IGNORED
    losses_B, tokens_B = measure_losses(model, ids_1T, labels)
    mean = average_losses(losses_B, tokens_B)
    if not torch.isfinite(mean):
        raise ValueError(
            f"the dense model's loss on generated text is {mean.item()}: its activations overflow (it computes in "
            f"{model.dtype}) or its weights contain NaN; load it with dtype bfloat16 or float32"
        )
    return float(mean.exp())
