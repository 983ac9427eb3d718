"""Windows: the tokens of the whole text, each scored once, chosen by seed."""

import json
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from gqaprune.data import windows
from gqaprune.data.corpora import SEPARATOR, Corpus
from gqaprune.data.windows import (
    cut_windows,
    describe_bos,
    describe_protocol,
    make_batches,
    read_windows,
    sample_windows,
    tokenize_corpus,
)
from gqaprune.models.losses import IGNORED

DOCUMENTS = [f"Document {number} says {'so ' * (number % 7)}much.\n" for number in range(300)]


@pytest.fixture(scope="module")
def merging_tokenizer() -> PreTrainedTokenizerFast:
    """A trained byte-level BPE with tokens of many bytes, which begins every text with `<s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<s>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([SEPARATOR.join(DOCUMENTS)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    """300 documents, which are read one by one."""
    rows = (json.dumps({"text": document}) for document in DOCUMENTS)
    return write_corpus(tmp_path / "documents.jsonl", "\n".join(rows))


def write_corpus(path: Path, text: str) -> Corpus:
    path.write_text(text, encoding="utf-8")
    return Corpus(str(path), "all")


def test_tokens_are_those_of_the_whole_joined_text(merging_tokenizer: PreTrainedTokenizerFast, corpus: Corpus) -> None:
    tokens = tokenize_corpus(merging_tokenizer, corpus)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == merging_tokenizer(SEPARATOR.join(DOCUMENTS))["input_ids"]
    assert (tokens == merging_tokenizer.bos_token_id).nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize("characters_per_read", [1, 100, 1 << 20])
def test_limited_tokens_are_the_first_of_the_whole_text(
    merging_tokenizer: PreTrainedTokenizerFast,
    corpus: Corpus,
    monkeypatch: pytest.MonkeyPatch,
    characters_per_read: int,
) -> None:
    monkeypatch.setattr(windows, "_CHARACTERS_PER_READ", characters_per_read)
    whole = merging_tokenizer(SEPARATOR.join(DOCUMENTS))["input_ids"]
    for limit in (*range(1, 60), 500, 100_000):
        assert tokenize_corpus(merging_tokenizer, corpus, limit).tolist() == whole[:limit]


def test_limit_reads_no_more_of_an_endless_corpus_than_it_needs(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_endless(corpus: Corpus) -> Iterator[str]:
        return repeat("words without end " * 100)

    monkeypatch.setattr(windows, "read_corpus", read_endless)
    monkeypatch.setattr(windows, "_CHARACTERS_PER_READ", 10_000)
    assert len(tokenize_corpus(tokenizer, Corpus("endless", "train"), limit=300)) == 300


def test_split_without_text_is_refused_by_name(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    write_corpus(tmp_path / "one_line.txt", "a single line is all in the train split")
    with pytest.raises(ValueError, match=r"one_line\.txt@test holds no text"):
        tokenize_corpus(tokenizer, Corpus(str(tmp_path / "one_line.txt"), "test"))


def test_windows_follow_each_other_and_the_rest_is_dropped() -> None:
    ids, labels = cut_windows(torch.arange(11), 4)
    assert ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert torch.equal(labels, ids)


def test_overlapping_windows_label_only_what_the_window_before_has_not() -> None:
    ids, labels = cut_windows(torch.arange(11), 4, stride=3)
    assert ids.tolist() == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert labels.tolist() == [[0, 1, 2, 3], [IGNORED, 4, 5, 6], [IGNORED, 7, 8, 9]]


@given(st.data())
def test_every_token_is_labelled_once_and_with_overlap_predicted_once(data: st.DataObject) -> None:
    window = data.draw(st.integers(2, 12), "window")
    stride = data.draw(st.integers(1, window), "stride")
    length = data.draw(st.integers(window, 60), "length")
    ids, labels = cut_windows(torch.arange(length), window, stride)
    covered = window + (len(ids) - 1) * stride
    assert covered <= length < covered + stride
    labelled = labels != IGNORED
    assert torch.equal(labels[labelled], ids[labelled])
    assert labels[labelled].tolist() == list(range(covered))
    # The first token of a window has nothing to be predicted from; with overlap it is labelled in the window before.
    predicted = labels[:, 1:][labelled[:, 1:]].tolist()
    starts = range(0, covered, window) if stride == window else (0,)
    assert predicted == [token for token in range(covered) if token not in starts]


def test_labels_can_be_changed_without_changing_tokens() -> None:
    tokens = torch.arange(8)
    ids, labels = cut_windows(tokens, 4)
    labels[:] = IGNORED
    assert ids.flatten().tolist() == tokens.tolist() == list(range(8))


@pytest.mark.parametrize(("window", "stride"), [(1, None), (0, None), (-4, None), (4, 0), (4, -1), (4, 5)])
def test_sizes_that_make_no_sense_are_refused_with_their_values(window: int, stride: int | None) -> None:
    with pytest.raises(ValueError, match=f"got window {window}, stride"):
        cut_windows(torch.arange(20), window, stride)


def test_too_few_tokens_for_a_window_are_refused() -> None:
    assert len(cut_windows(torch.arange(8), 8)[0]) == 1
    with pytest.raises(ValueError, match="7 tokens do not fill one window of 8"):
        cut_windows(torch.arange(7), 8)


def test_last_batch_is_smaller() -> None:
    ids, labels = cut_windows(torch.arange(28), 4, stride=4)
    batches = make_batches(ids, labels, 3)
    assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), ids)
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), labels)


def test_same_seed_samples_the_same_windows_and_another_seed_others() -> None:
    tokens = torch.arange(400)
    first, again = sample_windows(tokens, 4, 10, seed=3), sample_windows(tokens, 4, 10, seed=3)
    assert torch.equal(first, again)
    assert not torch.equal(first, sample_windows(tokens, 4, 10, seed=4))


def test_sample_does_not_touch_the_global_random_state() -> None:
    before = torch.get_rng_state()
    sample_windows(torch.arange(100), 4, 10, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_sampled_windows_are_different_windows_of_the_text() -> None:
    sampled = sample_windows(torch.arange(400), 4, 10, seed=0)
    starts = sampled[:, 0].tolist()
    assert len(set(starts)) == 10
    assert all(start % 4 == 0 for start in starts)
    assert torch.equal(sampled, sampled[:, :1] + torch.arange(4))


@pytest.mark.parametrize("count", [None, 25, 1000])
def test_all_windows_are_sampled_if_there_are_no_more(count: int | None) -> None:
    sampled = sample_windows(torch.arange(103), 4, count, seed=0)
    assert sorted(sampled.flatten().tolist()) == list(range(100))


def test_windows_of_two_corpora_are_mixed_and_never_cross_them(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    one = write_corpus(tmp_path / "one.txt", "a" * 83)
    two = write_corpus(tmp_path / "two.txt", "b" * 45)
    found = tokenizer.batch_decode(read_windows(tokenizer, [one, str(tmp_path / "two.txt")], window=8))
    assert sorted(found) == ["a" * 8] * 10 + ["b" * 8] * 5
    assert found != sorted(found)
    assert two.name == str(tmp_path / "two.txt")


def test_windows_of_corpora_are_limited_in_count_and_by_tokens_of_each(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    corpora = [write_corpus(tmp_path / f"{letter}.txt", letter * 100) for letter in "ab"]
    assert read_windows(tokenizer, corpora, window=8, count=5).shape == (5, 8)
    found = tokenizer.batch_decode(read_windows(tokenizer, corpora, window=8, limit=17))
    assert sorted(found) == ["a" * 8] * 2 + ["b" * 8] * 2


def test_corpus_that_is_named_is_read_from_its_train_split(tokenizer: PreTrainedTokenizerFast) -> None:
    named = read_windows(tokenizer, ["embedded"], window=64, count=4, seed=1)
    assert torch.equal(named, read_windows(tokenizer, [Corpus("embedded", "train")], window=64, count=4, seed=1))


def test_corpus_shorter_than_a_window_is_refused_by_name(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    long, short = write_corpus(tmp_path / "long.txt", "a" * 50), write_corpus(tmp_path / "short.txt", "b" * 7)
    with pytest.raises(ValueError, match=r"short\.txt@all: 7 tokens do not fill one window of 8"):
        read_windows(tokenizer, [long, short], window=8)


def test_no_corpus_at_all_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="no corpus given"):
        read_windows(tokenizer, [])


def test_every_window_begins_with_bos_which_is_of_its_length_and_has_no_label() -> None:
    ids, labels = cut_windows(torch.arange(11), 4, bos=99)
    assert ids.tolist() == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]
    assert labels.tolist() == [[IGNORED, 0, 1, 2], [IGNORED, 3, 4, 5], [IGNORED, 6, 7, 8]]


def test_a_texts_own_bos_is_not_doubled() -> None:
    ids, _ = cut_windows(torch.tensor([99, 0, 1, 2, 3]), 3, bos=99)
    assert ids.tolist() == [[99, 0, 1], [99, 2, 3]]


@given(st.data())
def test_with_bos_every_token_is_predicted_once_whatever_the_stride(data: st.DataObject) -> None:
    window = data.draw(st.integers(2, 12), "window")
    stride = data.draw(st.integers(1, window), "stride")
    length = data.draw(st.integers(window, 60), "length")
    ids, labels = cut_windows(torch.arange(length), window, stride, bos=99)
    assert (ids[:, 0] == 99).all() and not (ids[:, 1:] == 99).any()
    predicted = labels[:, 1:][labels[:, 1:] != IGNORED].tolist()
    assert predicted == list(range(len(predicted))) and length - min(stride, window - 1) < len(predicted) <= length


def test_too_few_tokens_for_a_window_with_bos_are_refused() -> None:
    assert len(cut_windows(torch.arange(7), 8, bos=99)[0]) == 1
    with pytest.raises(ValueError, match="6 tokens do not fill one window of 8"):
        cut_windows(torch.arange(6), 8, bos=99)


def test_windows_of_families_without_bos_are_those_of_the_tokens_alone(
    merging_tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> None:
    tokens = torch.tensor(merging_tokenizer(SEPARATOR.join(DOCUMENTS))["input_ids"])
    windows = tokens[: len(tokens) // 16 * 16].view(-1, 16)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(3))
    for bos in (None, False):
        assert torch.equal(read_windows(merging_tokenizer, [corpus], 16, 20, seed=3, bos=bos), windows[order[:20]])


def test_windows_that_are_read_begin_with_bos_where_it_is_asked_for(
    merging_tokenizer: PreTrainedTokenizerFast, corpus: Corpus
) -> None:
    windows = read_windows(merging_tokenizer, [corpus], 16, bos=True)
    assert (windows[:, 0] == 0).all() and not (windows[:, 1:] == 0).any()
    text = sorted(windows[:, 1:].tolist())
    assert text == sorted(tokenize_corpus(merging_tokenizer, corpus)[1:].unfold(0, 15, 15).tolist())


def test_the_protocol_says_which_windows_begin_with_bos(
    merging_tokenizer: PreTrainedTokenizerFast, tokenizer: PreTrainedTokenizerFast
) -> None:
    said = [describe_bos(merging_tokenizer, bos) for bos in (True, False)]
    assert said == ["each beginning with BOS", "only the first beginning with BOS"]
    assert [describe_bos(tokenizer, bos) for bos in (True, None)] == ["each beginning with BOS", ""]
    assert describe_protocol(64, None, 128, said[0]) == (
        "perplexity: token-weighted, non-overlapping windows of 64 tokens, each beginning with BOS, first 128 tokens"
    )
