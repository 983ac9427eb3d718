"""Cut documents into windows of equal length: tokenise, concatenate, cut; conversations are packed whole."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedTokenizerBase

from gqaprune.data.conversations import LossOn, encode_conversations, find_filler, pack
from gqaprune.data.corpora import SEPARATOR, Corpus, parse_corpus, read_corpus
from gqaprune.data.examples import Conversation, Example
from gqaprune.models.losses import IGNORED
from gqaprune.models.tokenizer import adds_bos, find_bos

Batch = dict[str, Tensor]
"""`input_ids` and `labels`, each `[batch, tokens]`; tokens that are only context have the label `IGNORED`.

Batches of dataloaders also have `index`, `[batch]`: each window's place among all windows of its stream.
"""

BATCH_TOKENS = 4096
"""Tokens of an evaluation batch if no batch size is given."""

_CHARACTERS_PER_READ = 1 << 20


def tokenize_corpus(tokenizer: PreTrainedTokenizerBase, corpus: Corpus, limit: int | None = None) -> Tensor:
    """Tokenise a corpus as one text: documents joined by a blank line, with the tokenizer's special tokens.

    Conversations follow one another, formatted by the tokenizer's chat template.

    Args:
        tokenizer: the model's tokenizer.
        corpus: corpus to read.
        limit: largest number of tokens to return, from the corpus's beginning; only as much text is read.

    Returns:
        Token ids, int64 `[tokens]`.

    Raises:
        ValueError: if the corpus cannot be read or is empty.
    """
    is_chat, examples = _open(corpus)
    if is_chat:
        encoded = encode_conversations(tokenizer, cast(Iterator[Conversation], examples), "all", limit=limit)
        return torch.tensor([token for one in encoded for token in one.ids][:limit], dtype=torch.long)
    return _tokenize(tokenizer, corpus, cast(Iterator[str], examples), limit)


def read_labelled_windows(
    tokenizer: PreTrainedTokenizerBase,
    corpus: Corpus,
    window: int,
    stride: int | None = None,
    limit: int | None = None,
    bos: bool | None = None,
    loss_on: LossOn = "assistant",
) -> tuple[Tensor, Tensor]:
    """Read windows of a corpus with labels, to train on or to measure perplexity on.

    Args:
        tokenizer: tokenizer of the model.
        corpus: documents, whose tokens are all learned; or conversations, which are packed into windows whole.
        window: tokens per window.
        stride: tokens between the starts of two windows of documents.
        limit: largest number of tokens to read.
        bos: whether every window begins with the beginning-of-text token; None follows the model's family.
        loss_on: tokens of conversations to learn.

    Returns:
        Token ids and labels, each `[windows, window]`.

    Raises:
        ValueError: if the corpus cannot be read, is shorter than a window, or has no token to learn.
    """
    is_chat, examples = _open(corpus)
    if not is_chat:
        tokens = _tokenize(tokenizer, corpus, cast(Iterator[str], examples), limit)
        return cut_windows(tokens, window, stride, find_bos(tokenizer, bos))
    encoded = encode_conversations(tokenizer, cast(Iterator[Conversation], examples), loss_on, bos, limit)
    windows, labels = pack(encoded, window, find_filler(tokenizer))
    if not len(windows):
        raise ValueError(f"none of {len(encoded)} conversations has a token to learn")
    return windows, labels


def _open(corpus: Corpus) -> tuple[bool, Iterator[Example]]:
    """Open a corpus; return whether it has conversations, and its examples."""
    examples = iter(read_corpus(corpus))
    first = next(examples, "")
    return isinstance(first, Conversation), chain([first], examples)


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, documents: Iterator[str], limit: int | None
) -> Tensor:
    pieces: list[str] = []
    characters = 0
    ids: list[int] = []
    while True:
        more = _read_characters(documents, _CHARACTERS_PER_READ)
        pieces.extend(more)
        characters += sum(map(len, more))
        # Text is cut off far behind the limit, so that the tokens before it are the same as those of the whole text.
        if not more or (limit is not None and characters > 12 * limit + _CHARACTERS_PER_READ // 2):
            ids = tokenizer(SEPARATOR.join(pieces), verbose=False)["input_ids"]
            if not more or (limit is not None and len(ids) >= limit):
                break
    if not characters:
        raise ValueError(f"corpus {corpus} holds no text")
    return torch.tensor(ids[:limit], dtype=torch.long)


def cut_windows(
    tokens: Tensor, window: int, stride: int | None = None, bos: int | None = None
) -> tuple[Tensor, Tensor]:
    """Cut tokens into full windows; tokens left at the end are dropped.

    Args:
        tokens: `[tokens]`.
        window: tokens per window.
        stride: tokens of the text between the starts of two windows, 1 to `window`; by default windows do not overlap.
            If they do, only tokens that are not in the window before have a label.
        bos: token that every window begins with, from `find_bos`: it is one of the `window` tokens, has no label, and
            replaces the one that the text may begin with.

    Returns:
        Token ids and labels, each `[windows, window]`.

    Raises:
        ValueError: if the tokens do not fill one window, or a size is out of range.
    """
    stride = window if stride is None else stride
    if window < 2 or not 1 <= stride <= window:
        raise ValueError(f"windows need window >= 2 and 1 <= stride <= window, got window {window}, stride {stride}")
    length = window if bos is None else window - 1  # of a window's text
    text = tokens[1:] if bos is not None and tokens[:1].eq(bos).all() else tokens
    if len(text) < length:
        raise ValueError(f"{len(tokens)} tokens do not fill one window of {window}: use more text or a shorter window")
    windows = text.unfold(0, length, min(stride, length)).clone()
    labels = windows.clone()
    labels[1:, : max(0, length - stride)] = IGNORED
    if bos is None:
        return windows, labels
    return functional.pad(windows, (1, 0), value=bos), functional.pad(labels, (1, 0), value=IGNORED)


def choose_batch_size(window: int) -> int:
    """Return how many windows of this length make a batch of `BATCH_TOKENS`, at least one."""
    return max(1, BATCH_TOKENS // window)


def make_batches(windows: Tensor, labels: Tensor, batch_size: int | None = None) -> list[Batch]:
    """Group windows into batches; the last may be smaller. None chooses the size from the windows' length."""
    batch_size = batch_size or choose_batch_size(windows.shape[1])
    pairs = zip(windows.split(batch_size), labels.split(batch_size), strict=True)
    return [{"input_ids": ids, "labels": targets} for ids, targets in pairs]


def sample_windows(tokens: Tensor, window: int, count: int | None, seed: int, bos: int | None = None) -> Tensor:
    """Choose non-overlapping windows at random; all of them if `count` is None or larger than their number.

    Args:
        tokens: `[tokens]`.
        window: tokens per window.
        count: number of windows.
        seed: the same seed and tokens choose the same windows in the same order.
        bos: token that every window begins with, as for `cut_windows`.

    Returns:
        Token ids `[windows, window]`.
    """
    return _choose(cut_windows(tokens, window, bos=bos)[0], count, seed)


def read_windows(
    tokenizer: PreTrainedTokenizerBase,
    corpora: Sequence[str | Corpus],
    window: int = 512,
    count: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    bos: bool | None = None,
) -> Tensor:
    """Choose windows from corpora at random and mix them, for calibration and fine-tuning.

    Args:
        tokenizer: the model's tokenizer.
        corpora: corpora, or their names, whose train split is read.
        window: tokens per window.
        count: number of windows over all corpora; None takes all.
        seed: seed of the choice and the order.
        limit: largest number of tokens to read from each corpus.
        bos: whether every window begins with the beginning-of-text token; None follows the model's family.

    Returns:
        Token ids `[windows, window]`.

    Raises:
        ValueError: if a corpus is missing, empty or shorter than one window, or `bos` is true and the tokenizer has no
            beginning-of-text token.
    """
    found, first = [], find_bos(tokenizer, bos)
    for corpus in corpora:
        corpus = parse_corpus(corpus, "train") if isinstance(corpus, str) else corpus
        tokens = tokenize_corpus(tokenizer, corpus, limit)
        try:
            found.append(cut_windows(tokens, window, bos=first)[0])
        except ValueError as error:
            raise ValueError(f"corpus {corpus}: {error}") from None
    if not found:
        raise ValueError("no corpus given: name at least one, for example 'embedded'")
    return _choose(torch.cat(found), count, seed)


def _choose(windows: Tensor, count: int | None, seed: int) -> Tensor:
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:count]]


def _read_characters(documents: Iterable[str], count: int) -> list[str]:
    """Take the next documents that together have at least `count` characters; fewer at the end."""
    taken, total = [], 0
    for document in documents:
        taken.append(document)
        total += len(document)
        if total >= count:
            break
    return taken


def describe_bos(tokenizer: PreTrainedTokenizerBase, bos: bool | None = None) -> str:
    """Describe which windows begin with the beginning-of-text token; empty if none does."""
    if find_bos(tokenizer, bos) is not None:
        return "each beginning with BOS"
    return "only the first beginning with BOS" if adds_bos(tokenizer) else ""


def describe_protocol(window: int, stride: int | None, tokens: int | None, bos: str = "") -> str:
    """Describe in words how perplexity is measured.

    Args:
        window: tokens of a window.
        stride: tokens between the starts of two windows.
        tokens: largest number of tokens of each corpus; None means all.
        bos: which windows begin with the beginning-of-text token, from `describe_bos`.
    """
    overlap = "non-overlapping windows" if stride in (None, window) else f"windows with stride {stride}"
    limit = "whole split" if tokens is None else f"first {tokens:,} tokens"
    return ", ".join(filter(None, ("perplexity: token-weighted", f"{overlap} of {window} tokens", bos, limit)))
