"""Encode conversations with the tokenizer's chat template, label them, and pack them into windows of equal length."""

import re
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice, takewhile
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gqaprune.common import limited
from gqaprune.common.console import track
from gqaprune.common.errors import first_line
from gqaprune.common.limited import run_limited
from gqaprune.data.examples import ASSISTANT, Conversation
from gqaprune.data.prompts import encode_beginning
from gqaprune.models.losses import IGNORED
from gqaprune.models.tokenizer import find_bos

LossOn = Literal["assistant", "all"]
_GENERATION = re.compile(r"\{%-?\s*generation\b")
"""The tag with which some templates mark the assistant's tokens."""
_BATCH = 256
"""Conversations that one child process encodes."""
_SECONDS_PER_TURN = 0.02
_SHOWN = 600
"""Largest number of an example's characters to show."""


class Encoded(NamedTuple):
    """A conversation as a model reads it.

    Args:
        ids: token ids.
        labels: the same ids, but `IGNORED` for tokens that are not learned.
    """

    ids: list[int]
    labels: list[int]


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Iterable[Conversation],
    loss_on: LossOn = "assistant",
    bos: bool | None = None,
    limit: int | None = None,
) -> list[Encoded]:
    """Encode conversations with the tokenizer's chat template, or as plain text if the tokenizer has none.

    The assistant's tokens are those that the template marks (`{% generation %}`); if it marks none, they are the text
    that the assistant's turn adds to the conversation, up to the token that ends the turn. Anyone may have written a
    template, and it is a program, so it runs in child processes with limits.

    Args:
        tokenizer: tokenizer of the model.
        conversations: conversations to encode.
        loss_on: tokens to learn, those of the `assistant` or `all`.
        bos: whether each conversation begins with the beginning-of-text token; None follows the model's family.
        limit: number of tokens after which to stop encoding.

    Raises:
        ValueError: if messages need a template and there is none, the template refuses them, or the assistant's tokens
            cannot be told from others.
    """
    has_template = getattr(tokenizer, "chat_template", None) is not None
    encode = partial(_encode_chat if has_template else _encode_plain, tokenizer, loss_on, bos)
    encoded: list[Encoded] = []
    tokens = 0
    for batch in track(list(_cut(conversations)), "conversations", f"x {_BATCH}"):
        turns = sum(len(conversation.messages) for conversation in batch)
        answers = _encode_batch(encode, batch, limited.SECONDS + _SECONDS_PER_TURN * turns, has_template)
        encoded += [Encoded(*answer) for answer in answers]
        tokens += sum(len(ids) for ids, _ in answers)
        if limit is not None and tokens >= limit:
            break
    return encoded


def pack(encoded: Sequence[Encoded], window: int, filler: int) -> tuple[Tensor, Tensor]:
    """Pack conversations into windows: several whole ones in a window where they fit, then filler tokens.

    The first token of each has no label, because the token before it belongs to another conversation. A conversation
    that is longer than a window is cut into several.

    Args:
        encoded: conversations.
        window: tokens per window.
        filler: token that fills the ends of windows, where no other token attends to it; it has no label.

    Returns:
        Token ids and labels, each `[windows, window]`; windows without any label are left out.
    """
    pieces = [
        Encoded(ids[start : start + window], [IGNORED, *labels[start + 1 : start + window]])
        for ids, labels in encoded
        for start in range(0, len(ids), window)
    ]
    learned = [piece for piece in pieces if any(label != IGNORED for label in piece.labels)]
    bins: list[list[Encoded]] = []
    spaces: list[tuple[int, int]] = []  # free tokens of each bin, and the bin's index
    for piece in sorted(learned, key=lambda one: -len(one.ids)):  # best fit, longest first
        place = bisect_left(spaces, (len(piece.ids), -1))
        left, number = spaces.pop(place) if place < len(spaces) else (window, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(piece)
        insort(spaces, (left - len(piece.ids), number))
    rows = [[list(chain.from_iterable(piece[part] for piece in own)) for own in bins] for part in (0, 1)]
    filled = [
        torch.tensor([row + [blank] * (window - len(row)) for row in own], dtype=torch.long).view(-1, window)
        for own, blank in zip(rows, (filler, IGNORED), strict=True)
    ]
    return filled[0], filled[1]


def find_filler(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that fills windows: the padding token, else the end-of-text token, else 0."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def describe_example(tokenizer: PreTrainedTokenizerBase, example: Encoded) -> str:
    """Describe an example as text, with the parts that are not learned in double brackets."""
    text, is_learned = "", None
    last = max((place for place, label in enumerate(example.labels) if label != IGNORED), default=len(example.ids))
    runs: list[tuple[bool, list[int]]] = []
    for token, label in list(zip(example.ids, example.labels, strict=True))[: last + 1]:
        if is_learned != (label != IGNORED):
            is_learned = label != IGNORED
            runs.append((is_learned, []))
        runs[-1][1].append(token)
    for is_own, ids in runs:
        part = str(tokenizer.decode(ids))
        text += part if is_own else f"⟦{part}⟧"
    return text if len(text) <= _SHOWN else text[:_SHOWN] + " …"


def _cut(conversations: Iterable[Conversation]) -> Iterator[list[Conversation]]:
    rest = iter(conversations)
    while batch := list(islice(rest, _BATCH)):
        yield batch


def _encode_batch(
    encode: Callable[[Conversation], Encoded], batch: Sequence[Conversation], seconds: float, has_template: bool
) -> list[tuple[list[int], list[int]]]:
    def work() -> list[Any]:
        answers: list[Any] = []
        for conversation in batch:
            try:
                answers.append(encode(conversation))
            except MemoryError:
                raise
            except Exception as error:  # a template can raise anything
                return [*answers, first_line(error)]
        return answers

    answers = run_limited(work, seconds) if has_template else work()
    if isinstance(answers[-1], str):
        content = batch[len(answers) - 1].messages[0]["content"][:80]
        raise ValueError(f"the conversation that begins with {content!r} cannot be encoded: {answers[-1]}")
    return [(ids, labels) for ids, labels in answers]


def _encode_plain(
    tokenizer: PreTrainedTokenizerBase, loss_on: LossOn, bos: bool | None, conversation: Conversation
) -> Encoded:
    if conversation.plain is None:
        raise ValueError(
            "the tokenizer has no chat template, and messages need one: use columns `prompt` and `completion` instead"
        )
    before = encode_beginning(tokenizer, conversation.plain[0], bos)
    after = list(tokenizer(conversation.plain[1], add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id is not None:
        after.append(tokenizer.eos_token_id)
    return Encoded(before + after, (before if loss_on == "all" else [IGNORED] * len(before)) + after)


def _encode_chat(
    tokenizer: PreTrainedTokenizerBase, loss_on: LossOn, bos: bool | None, conversation: Conversation
) -> Encoded:
    messages = list(conversation.messages)
    answers = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]
    if loss_on == "all":
        ids = list(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"])
        is_learned = [True] * len(ids)
    elif _GENERATION.search(str(tokenizer.chat_template)) and list(conversation.learned) == answers:
        filled = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        ids, is_learned = list(filled["input_ids"]), [bool(own) for own in filled["assistant_masks"]]
    else:
        ids, is_learned = _mark_turns(tokenizer, messages, conversation.learned)
    first = find_bos(tokenizer, bos)
    if first is not None and ids[:1] != [first]:
        ids, is_learned = [first, *ids], [False, *is_learned]
    return Encoded(ids, [token if own else IGNORED for token, own in zip(ids, is_learned, strict=True)])


def _mark_turns(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]], learned: Sequence[int]
) -> tuple[list[int], list[bool]]:
    """Return token ids, and which of them belong to learned turns, for templates that do not mark them."""

    def render(upto: int, asks: bool = False) -> str:
        if not upto:
            return ""
        text = tokenizer.apply_chat_template(messages[:upto], tokenize=False, add_generation_prompt=asks)
        return str(text)

    whole = render(len(messages))
    spans = []
    place = 0
    for index in learned:
        start, place = _find_turn(tokenizer, render, whole, index, messages[index]["content"].strip(), place)
        spans.append((start, _end_turn(tokenizer, whole, start, place)))
    filled = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    offsets = filled["offset_mapping"]
    is_learned = [any(start <= own < end for start, end in spans) for own, _ in offsets]
    return list(filled["input_ids"]), is_learned


def _find_turn(
    tokenizer: PreTrainedTokenizerBase, render: Callable[..., str], whole: str, index: int, content: str, place: int
) -> tuple[int, int]:
    """Return where a turn, without its header, begins and ends in the text of the whole conversation."""
    through = render(index + 1)
    asked, without = (render(index, asks=True), render(index)) if index else (render(1, asks=True), through)
    header = asked.removeprefix(without)
    if index or not header:
        before = asked if index else None
    else:  # the first turn: templates need not render a conversation without any, and some begin with a system prompt
        before = through[: through.find(header) + len(header)] if header in through else None
    if before is not None and whole.startswith(before) and whole.startswith(through):
        return len(before), len(through)
    # Some templates write a turn differently when later turns follow.
    start = whole.find(content, place) if content else -1
    if start >= 0:
        following = through[through.rfind(content) + len(content) :]
        is_ended = whole.startswith(following, start + len(content))
        end = start + len(content) + (len(following) if is_ended else 0)
        if not header:  # spaces before the content belong to the answer
            start = max(place, len(whole[:start].rstrip()))
        return start, end
    ends = [token for token in tokenizer.all_special_tokens if token and through.rstrip().endswith(token)]
    pairs = zip(whole, before or "", strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))  # characters
    is_there = shared >= (len(without) if index else 1)
    if is_there and ends and (end := whole.find(ends[0], shared)) >= 0:
        return shared, end + len(ends[0])  # a turn of calls alone
    raise ValueError(
        "the assistant's tokens cannot be told from others in this chat template: use a template that marks them with "
        "{% generation %}, or set data.loss_on to all"
    )


def _end_turn(tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int) -> int:
    """Return where a turn ends: after its last special token if only spaces follow it, else at `end`."""
    ends = [
        position + len(token)
        for token in tokenizer.all_special_tokens
        if token and (position := text.rfind(token, start, end)) >= 0
    ]
    last = max(ends, default=end)
    return last if not text[last:end].strip() else end
