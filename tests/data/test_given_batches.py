"""Token ids from other projects' batches, and padding moved to where no token sees it."""

from typing import Any

import pytest
import torch

from gqaprune.data.given_batches import align_batch, read_given_batches
from gqaprune.models.losses import IGNORED, measure_losses

from tiny import make_model

PADDED = {
    "input_ids": torch.tensor([[5, 6, 7, 0, 0], [0, 0, 8, 9, 3], [1, 2, 3, 4, 5], [4, 0, 0, 0, 0]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]),
}


def test_padding_is_left_out_and_rows_of_a_length_stay_together() -> None:
    read = [ids.tolist() for ids in read_given_batches([PADDED, torch.tensor([7, 8])])]
    assert read == [[[5, 6, 7], [8, 9, 3]], [[1, 2, 3, 4, 5]], [[7, 8]]]


def test_no_more_batches_are_read_than_asked_for() -> None:
    def endless() -> Any:
        while True:
            yield torch.ones(2, 3, dtype=torch.long)

    assert len(read_given_batches(endless(), 3)) == 3


@pytest.mark.parametrize(
    ("batch", "sentence"),
    [
        ("text", "calibration batch 0 has no token ids: .* got str"),
        ({"pixels": torch.ones(2)}, "got a mapping with pixels"),
        (torch.ones(2, 3), "has no token ids"),
        (PADDED | {"attention_mask": torch.ones(4, 4)}, r"attention_mask \[4, 4\] for input_ids \[4, 5\]"),
        (torch.ones(3, 1, dtype=torch.long), "have no row of at least 2 tokens"),
    ],
)
def test_what_holds_no_text_is_refused(batch: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_given_batches([batch])


def test_a_padded_batch_has_the_losses_of_its_rows_alone() -> None:
    model, labels = make_model(), PADDED["input_ids"].clone()
    labels[1, 3] = IGNORED
    aligned = align_batch(PADDED | {"labels": labels, "position_ids": PADDED["input_ids"]})
    assert set(aligned) == {"input_ids", "labels"}
    sums_B, tokens_B = measure_losses(model, aligned["input_ids"], aligned["labels"])
    for row, (mask, ids, label) in enumerate(
        zip(PADDED["attention_mask"].bool(), PADDED["input_ids"], labels, strict=True)
    ):
        alone, count = measure_losses(model, ids[mask][None], label[mask][None])
        assert int(tokens_B[row]) == int(count[0])
        torch.testing.assert_close(sums_B[row], alone[0], rtol=1e-5, atol=1e-6)


def test_a_batch_without_padding_is_as_it_was() -> None:
    ids = PADDED["input_ids"]
    assert align_batch({"input_ids": ids})["labels"] is ids
    whole = align_batch({"input_ids": ids, "attention_mask": torch.ones_like(ids), "index": ids})
    assert whole["input_ids"] is ids and whole["index"] is ids and "attention_mask" not in whole


IDS, MASK = PADDED["input_ids"], PADDED["attention_mask"]


@pytest.mark.parametrize("batch", [(IDS, MASK, IDS), [IDS, MASK.bool()], ([IDS, MASK], 0), (PADDED, 0)])
def test_the_mask_of_a_tuple_hides_padding(batch: Any) -> None:
    read = [ids.tolist() for ids in read_given_batches([batch])]
    assert read == [[[5, 6, 7], [8, 9, 3]], [[1, 2, 3, 4, 5]]]


def test_a_mask_of_the_loss_or_labels_in_a_tuple_hide_nothing() -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    for other in (torch.tensor([[0, 0, 1, 1]]), torch.tensor([[-100, -100, 7, 8]])):
        (read,) = read_given_batches([(ids, other)])
        assert read.tolist() == ids.tolist()


def test_a_nested_list_of_ids_is_a_batch_of_all_its_rows() -> None:
    assert [ids.tolist() for ids in read_given_batches([[[1, 2, 3], [4, 5, 6]]])] == [[[1, 2, 3], [4, 5, 6]]]


def test_a_tensor_alone_is_its_own_labels() -> None:
    for batch in (IDS, [IDS]):
        aligned = align_batch(batch)
        assert aligned["input_ids"] is IDS and aligned["labels"] is IDS


@pytest.mark.parametrize(
    ("batch", "got"), [((IDS, MASK), "a tuple of 2"), ({"pixels": IDS}, "a mapping with pixels"), (IDS[0], r"\[5\]")]
)
def test_parts_without_names_are_refused_where_labels_matter(batch: Any, got: str) -> None:
    with pytest.raises(ValueError, match=f"got .*{got}: return a mapping with input_ids, labels and attention_mask"):
        align_batch(batch)
