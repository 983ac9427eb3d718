"""Read prompts from a list or a file, and encode them, as the user's turn of a chat if the tokenizer has a template."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gqaprune.common import limited
from gqaprune.common.errors import first_line
from gqaprune.common.limited import run_limited
from gqaprune.common.paths import expand_path
from gqaprune.common.safe_text import replace_halves
from gqaprune.models.tokenizer import find_bos

Message = dict[str, str]
"""`role` and `content` of one turn of a chat."""
_SECONDS_PER_PROMPT = 0.02
_SHOWN = 200
"""Largest number of a prompt's characters to show in an error."""


@dataclass(frozen=True)
class Prompt:
    """A text or a chat that a model continues.

    Args:
        text: plain text, or the user's last message.
        messages: the chat up to the assistant's answer; empty for plain text.
    """

    text: str
    messages: tuple[Message, ...] = ()


def read_prompts(source: str | Sequence[str]) -> list[Prompt]:
    """Return prompts from a list, or read them from a file.

    Args:
        source: prompts, or the path of a file with one prompt per line; in a `.jsonl` file a line is a string, an
            object with `prompt`, or one with `messages`, whose last assistant messages are left out.

    Raises:
        ValueError: if the file does not exist, has no prompt, or has a line that is none of these.
    """
    if not isinstance(source, str):
        prompts = [Prompt(replace_halves(text)) for text in source]
    else:
        path = Path(expand_path(source))
        if not path.is_file():
            raise ValueError(
                f"data.prompts {source!r} is not a file: use a file with one prompt per line (.txt, .jsonl), or a list "
                """of texts, such as '["Once upon a time"]'"""
            )
        try:
            lines = [(n, line) for n, line in enumerate(path.read_text("utf-8-sig").split("\n"), 1) if line.strip()]
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not valid UTF-8: use a .txt or .jsonl file of prompts") from None
        is_json = path.suffix == ".jsonl"
        prompts = [_read_line(line, f"{path}, line {n}") if is_json else Prompt(line) for n, line in lines]
    if not prompts:
        raise ValueError("data.prompts has no prompt: give at least one, such as '[Once upon a time]'")
    return prompts


def _read_line(line: str, place: str) -> Prompt:
    try:
        value: Any = json.loads(line)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{place} is not JSON: {error}") from None
    if isinstance(value, dict):
        value = value.get("messages", value.get("prompt"))
    if isinstance(value, str):
        return Prompt(replace_halves(value))
    wrong = f"{place} is not a prompt: write a string, an object with `prompt`, or an object with `messages` that each "
    wrong += "have a `role` and a `content`"
    if not isinstance(value, list):
        raise ValueError(wrong)
    messages: list[Message] = []
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise ValueError(wrong)
        messages.append({key: replace_halves(message[key]) for key in ("role", "content")})
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise ValueError(f"{place} has no message that an assistant could answer: end it with a message of the user")
    return Prompt(messages[-1]["content"], tuple(messages))


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, chat: bool | None = None, bos: bool | None = None
) -> dict[str, Tensor]:
    """Encode one prompt as token ids, as `encode_prompts` does."""
    return encode_prompts(tokenizer, [prompt], chat, bos)[0]


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], chat: bool | None = None, bos: bool | None = None
) -> list[dict[str, Tensor]]:
    """Encode prompts as token ids.

    Args:
        tokenizer: tokenizer of the model.
        prompts: plain texts or chats.
        chat: whether plain text becomes the user's turn in the tokenizer's chat template; None uses the template if
            there is one.
        bos: whether a prompt begins with the beginning-of-text token, whatever tokenizer and template add; None
            follows the model's family.

    Returns:
        `input_ids` of each prompt, `[1, tokens]`; they end with an end-of-text token only if the template or the text
        does.

    Raises:
        ValueError: if a template is needed and missing, or refuses a chat, or a prompt has no tokens.
    """
    has_template = getattr(tokenizer, "chat_template", None) is not None
    for prompt in prompts if not has_template else ():
        if prompt.messages or chat:
            what = "a prompt is a list of messages" if prompt.messages else "data.chat is true"
            raise ValueError(
                f"{what}, but the tokenizer has no chat template: use plain text and set data.chat to false"
            )
    are_chats = [bool(prompt.messages or (has_template if chat is None else chat)) for prompt in prompts]
    filled = iter(_fill_in_template(tokenizer, list(compress(prompts, are_chats))) if any(are_chats) else [])
    encoded, first = [], find_bos(tokenizer, bos)
    for prompt, is_chat in zip(prompts, are_chats, strict=True):
        ids = next(filled) if is_chat else encode_beginning(tokenizer, prompt.text, bos)
        if not ids:
            raise ValueError(f"the prompt {prompt.text[:_SHOWN]!r} has no tokens: give at least one character")
        encoded.append({"input_ids": torch.tensor([_begin_with(first, ids)], dtype=torch.long)})
    return encoded


def _fill_in_template(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Encode chats as token ids in a child process, because a template is a program that anyone may have written."""

    def fill_in() -> list[list[int] | str]:
        answers: list[list[int] | str] = []
        for prompt in prompts:
            messages = list(prompt.messages) or [{"role": "user", "content": prompt.text}]
            try:
                answers.append(list(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]))
            except MemoryError:
                raise
            except Exception as error:  # a template can raise anything
                return [*answers, first_line(error)]
        return answers

    refused, reason, answers = prompts[0], "", list[Any]()
    try:
        answers = run_limited(fill_in, limited.SECONDS + _SECONDS_PER_PROMPT * len(prompts))
        if isinstance(answers[-1], str):
            refused, reason = prompts[len(answers) - 1], answers[-1]
    except ValueError as error:
        reason = str(error)
    if reason:
        what = f"the prompt {refused.text[:_SHOWN]!r}"
        raise ValueError(f"the chat template refuses {what}: {reason}; set data.chat to false")
    return answers


def encode_beginning(tokenizer: PreTrainedTokenizerBase, text: str, bos: bool | None = None) -> list[int]:
    """Encode text that is to be continued: special tokens may precede it, but none follow it.

    Args:
        tokenizer: tokenizer, which may append an end-of-text token to texts.
        text: text to be continued.
        bos: whether it begins with the beginning-of-text token; None follows the model's family.
    """
    ids: list[int] = tokenizer(text)["input_ids"]
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    places = range(len(ids) - len(bare) + 1)
    ends = [place + len(bare) for place in places if ids[place : place + len(bare)] == bare]
    return _begin_with(find_bos(tokenizer, bos), ids[: max(ends[0], 1)] if ends else ids)


def _begin_with(bos: int | None, ids: list[int]) -> list[int]:
    return ids if bos is None or ids[:1] == [bos] else [bos, *ids]
