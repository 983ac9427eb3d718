"""Check before any work whether transformers can save a model."""

import copy
from tempfile import TemporaryDirectory

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from gqaprune.common.errors import first_line


def check_saves(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Raise an error for configs that transformers can load but not save, such as `output_attentions` with sdpa.

    Args:
        model: the model; its weights are not used.
        tokenizer: tokenizer to save beside it.

    Raises:
        ValueError: with the file to correct.
    """
    parts = (
        (copy.deepcopy(model.config), CONFIG_NAME),
        (getattr(model, "generation_config", None), GENERATION_CONFIG_NAME),
        (tokenizer, "tokenizer files"),
    )
    with TemporaryDirectory() as folder:
        for part, file in parts:
            try:
                if part is not None:
                    part.save_pretrained(folder)
            except Exception as error:  # some checks run only on saving
                reason = first_line(error).rstrip(".")
                raise ValueError(f"transformers refuses to save the model: {reason}; correct its {file}") from None
