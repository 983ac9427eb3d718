"""Continue prompts greedily, and how likely a model finds a text; one prompt at a time, without sampling."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gqaprune.models.losses import IGNORED, measure_losses


@torch.inference_mode()
def continue_greedily(model: PreTrainedModel, prompt: Mapping[str, Tensor], max_new_tokens: int) -> Tensor:
    """Prompt and continuation as token ids `[1, tokens]`, the end-of-text token included where one came.

    Args:
        model: the causal LM, whole on one device.
        prompt: `input_ids` and `attention_mask`, each `[1, tokens]`.
        max_new_tokens: tokens to add at most.
    """
    output = model.generate(**prompt, max_new_tokens=max_new_tokens, do_sample=False)
    assert isinstance(output, Tensor)
    return output


def split_continuation(model: PreTrainedModel, ids_1T: Tensor, prompt_tokens: int) -> tuple[list[int], bool]:
    """What a model added to a prompt, without the end-of-text token, and whether it ended by one."""
    added = ids_1T[0, prompt_tokens:].tolist()
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    is_ended = bool(added) and added[-1] in (ends if isinstance(ends, list) else [ends])
    return added[: len(added) - is_ended], is_ended


@torch.inference_mode()
def measure_text_perplexity(model: PreTrainedModel, ids_1T: Tensor, prompt_tokens: int) -> float:
    """Perplexity of what follows a prompt, the end-of-text token included.

    Args:
        model: the causal LM that judges.
        ids_1T: prompt and continuation.
        prompt_tokens: how many of them, at least 1, are given.

    Raises:
        ValueError: if it is not a finite number.
    """
    labels = ids_1T.clone()
    labels[:, :prompt_tokens] = IGNORED
    losses_B, tokens_B = measure_losses(model, ids_1T, labels)
    mean = losses_B.double().sum() / tokens_B.sum()
    if not torch.isfinite(mean):
        raise ValueError(
            f"the dense model's loss on generated text is {mean.item()}: its activations overflow (it computes in "
            f"{model.dtype}) or its weights hold NaN; load it with dtype bfloat16 or float32"
        )
    return float(mean.exp())
