"""Text streams: what each loader yields, that evaluated text is never trained on, and that no window counts twice."""

import json
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import DistributedSampler
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import gqaprune
from gqaprune.cli.lightning_cli import PruningCLI
from gqaprune.data.corpora import SEPARATOR, read_corpus
from gqaprune.data.sampling import sample_from_model
from gqaprune.data.windows import make_batches
from gqaprune.datamodules import TextDataModule
from gqaprune.models.loading import load_model
from gqaprune.models.losses import IGNORED

from tiny import make_model, make_tokenizer, merge_settings

LINES = [f"Line {number} of the book, as it was written.\n" for number in range(200)]


@pytest.fixture
def book(tmp_path: Path) -> Path:
    """A text of about 8,000 characters in 200 different lines."""
    path = tmp_path / "book.txt"
    path.write_text("".join(LINES))
    return path


@pytest.fixture
def make_data(tiny_folder: Path, book: Path) -> Any:
    """Builds a datamodule on the book's splits, with small windows."""

    def make(tokenizer: str = str(tiny_folder), **changes: Any) -> TextDataModule:
        settings = {
            "calibration": {"corpora": [f"{book}@train"], "windows": 10, "window": 32},
            "training": {"corpora": [f"{book}@train"], "window": 48},
            "evaluation": {"val": [f"{book}@validation"], "test": [f"{book}@test"], "window": 64},
        }
        return TextDataModule(tokenizer, **merge_settings(settings, changes))

    return make


def read_split(book: Path, start: float, end: float) -> str:
    """The lines of a split of the book, by their share of its characters."""
    total, seen, text = len(book.read_text()), 0, ""
    for line in LINES:
        if start * total <= seen < end * total:
            text += line
        seen += len(line)
    return text


def test_calibration_batches_hold_the_windows_that_were_asked(make_data: Any) -> None:
    batches = make_data(calibration={"batch_size": 4}).calibration_batches()
    assert [tuple(batch.shape) for batch in batches] == [(4, 32), (4, 32), (2, 32)]
    assert all(batch.dtype == torch.int64 for batch in batches)


def test_all_windows_calibrate_if_no_number_is_given(make_data: Any, book: Path) -> None:
    batches = make_data(calibration={"windows": None, "batch_size": 1000}).calibration_batches()
    assert len(batches) == 1
    assert len(batches[0]) == len(read_split(book, 0, 0.8)) // 32 - 8  # which are held out
    (batch,) = make_data(calibration={"windows": None, "batch_size": 1000, "held_out_windows": 0}).calibration_batches()
    assert len(batch) == len(read_split(book, 0, 0.8)) // 32


def test_calibration_windows_follow_from_the_seed(make_data: Any) -> None:
    first, again, other = (torch.cat(make_data(seed=seed).calibration_batches()) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_calibration_windows_are_pieces_of_the_train_split(make_data: Any, book: Path) -> None:
    data = make_data()
    for window in torch.cat(data.calibration_batches()):
        assert data.tokenizer.decode(window) in read_split(book, 0, 0.8)


def test_calibration_reads_the_embedded_text_by_default(tiny_folder: Path) -> None:
    batches = TextDataModule(str(tiny_folder)).calibration_batches()
    assert [tuple(batch.shape) for batch in batches] == [(4, 512)] * 32


def test_sampled_windows_are_mixed_with_those_of_the_corpora(
    make_data: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gqaprune.datamodules.text.sample_from_model", partial(sample_from_model, cache=tmp_path))
    model = load_model(tiny_folder)
    data = make_data(calibration={"sampled_windows": 6, "batch_size": 16})
    (mixed,) = data.calibration_batches(model)
    sampled = sample_from_model(model, data.tokenizer, 6, 32, cache=tmp_path)
    (corpus,) = make_data(calibration={"batch_size": 16}).calibration_batches()
    assert sorted(mixed.tolist()) == sorted(corpus.tolist() + sampled.tolist())
    assert mixed[:10].tolist() != corpus.tolist()
    (alone,) = make_data(calibration={"corpora": [], "sampled_windows": 6, "batch_size": 16}).calibration_batches(model)
    assert sorted(alone.tolist()) == sorted(sampled.tolist())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"calibration": {"sampled_windows": -1}}, "sampled_windows must be at least 0, got -1"),
        ({"calibration": {"sampled_windows": 2}}, "pass the model"),
        ({"calibration": {"corpora": []}}, "has neither corpora nor sampled_windows"),
    ],
)
def test_calibration_without_text_is_refused(make_data: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_data(**settings).calibration_batches()


def test_evaluation_batches_are_named_by_stream_and_corpus(make_data: Any) -> None:
    batches = make_data(evaluation={"test": ["embedded@test"]}).evaluation_batches()
    assert list(batches) == ["val/book", "test/embedded"]


def test_evaluation_batches_hold_the_split_from_its_beginning(make_data: Any, book: Path) -> None:
    data = make_data(evaluation={"batch_size": 3})
    batches = data.evaluation_batches()["val/book"]
    text = read_split(book, 0.8, 0.9)
    windows = len(text) // 64
    assert [len(batch["input_ids"]) for batch in batches] == [3] * (windows // 3) + [windows % 3] * (windows % 3 > 0)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    assert data.tokenizer.decode(ids.flatten()) == text[: 64 * windows]
    assert torch.equal(ids, torch.cat([batch["labels"] for batch in batches]))


def test_batches_without_a_size_have_as_many_windows_as_make_4096_tokens(make_data: Any) -> None:
    data = make_data(evaluation={"batch_size": None, "stride": 4})
    assert [len(batch["input_ids"]) for batch in data.evaluation_batches()["val/book"]][:2] == [64, 64]
    assert len(next(iter(data.val_dataloader()[0]))["input_ids"]) == 64
    assert [len(batch["input_ids"]) for batch in make_batches(torch.zeros(3, 5000), torch.zeros(3, 5000))] == [1] * 3


def test_evaluation_is_limited_to_the_first_tokens(make_data: Any) -> None:
    whole = make_data(evaluation={"batch_size": 100}).evaluation_batches()["val/book"][0]["input_ids"]
    first = make_data(evaluation={"batch_size": 100, "tokens": 200}).evaluation_batches()["val/book"][0]["input_ids"]
    assert torch.equal(first, whole[:3])


def test_strided_evaluation_labels_every_token_once(make_data: Any) -> None:
    (batch,) = make_data(evaluation={"stride": 16, "batch_size": 1000}).evaluation_batches()["val/book"]
    windows = len(batch["input_ids"])
    assert windows > 10
    assert int((batch["labels"] != IGNORED).sum()) == 64 + 16 * (windows - 1)


def test_val_and_test_loaders_yield_the_evaluation_batches(make_data: Any) -> None:
    data = make_data(evaluation={"batch_size": 3})
    batches = data.evaluation_batches()
    for loaders, name in ((data.val_dataloader(), "val/book"), (data.test_dataloader(), "test/book")):
        assert len(loaders) == 1
        for loaded, expected in zip(loaders[0], batches[name], strict=True):
            assert torch.equal(loaded["input_ids"], expected["input_ids"])
            assert torch.equal(loaded["labels"], expected["labels"])


@pytest.mark.parametrize("used", ["calibration", "training"])
@pytest.mark.parametrize("evaluated", ["val", "test"])
def test_text_that_is_used_and_evaluated_is_refused(make_data: Any, book: Path, used: str, evaluated: str) -> None:
    others = {name: {"corpora": ["wikitext2"]} for name in ("calibration", "training")}
    others |= {"evaluation": {"val": ["ptb"], "test": ["ptb"]}}
    for text in ("embedded@test", f"{book.parent}/*.txt", f"{book}@all"):
        same = {used: {"corpora": ["c4@train", text]}, "evaluation": {evaluated: ["c4@validation", text]}}
        with pytest.raises(ValueError, match=rf"data\.{used}\.corpora .* overlaps with data\.evaluation\.{evaluated} "):
            make_data(**merge_settings(others, same))


@pytest.mark.parametrize("used", ["calibration", "training"])
def test_test_split_is_refused_for_calibration_and_training(make_data: Any, used: str) -> None:
    message = rf"data\.{used}\.corpora embedded@test overlaps with data\.evaluation\.test embedded@test"
    with pytest.raises(ValueError, match=message):
        make_data(**{used: {"corpora": ["embedded@test"]}, "evaluation": {"test": ["embedded"]}})


def test_whole_file_is_refused_beside_a_split_of_it(make_data: Any, book: Path) -> None:
    with pytest.raises(ValueError, match=r"book\.txt@all overlaps with data\.evaluation\.val .*book\.txt@validation"):
        make_data(calibration={"corpora": [str(book)]})


def test_default_streams_do_not_overlap(tiny_folder: Path) -> None:
    data = TextDataModule(str(tiny_folder))
    assert {stream: [str(corpus) for corpus in corpora] for stream, corpora in data.corpora.items()} == {
        "calibration": ["embedded@train"],
        "train": ["embedded@train"],
        "val": ["embedded@validation"],
        "test": ["embedded@test"],
    }


def test_labels_are_short_where_they_are_unique_and_full_where_not(make_data: Any, book: Path) -> None:
    data = make_data(evaluation={"val": [f"{book}@validation", f"{book}@test", "embedded"]})
    assert data.get_labels("val") == [f"{book}@validation", f"{book}@test", "embedded"]
    assert data.get_labels("test") == ["book"]
    assert [name for name in data.evaluation_batches() if name.startswith("val/")] == [
        f"val/{book}@validation",
        f"val/{book}@test",
        "val/embedded",
    ]


def test_files_of_one_name_in_two_folders_have_labels_of_their_own(make_data: Any, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text(f"{folder} " * 100)
    data = make_data(evaluation={"val": [f"{tmp_path}/a/x.txt", f"{tmp_path}/b/x.txt"]})
    assert len(set(data.get_labels("val"))) == 2
    assert len(data.evaluation_batches()) == 3


def test_there_is_a_label_for_every_loader_even_if_a_corpus_is_given_twice(make_data: Any, book: Path) -> None:
    try:
        data = make_data(evaluation={"val": [f"{book}@validation", f"{book}@validation", "embedded"]})
    except ValueError:  # refusing it would do as well
        return
    assert len(data.get_labels("val")) == len(data.val_dataloader())


def test_train_loader_yields_every_window_once_with_equal_labels(make_data: Any, book: Path) -> None:
    loader = make_data(training={"batch_size": 3}).train_dataloader()
    batches = list(loader)
    assert all(torch.equal(batch["input_ids"], batch["labels"]) for batch in batches)
    assert all(batch["input_ids"].shape[1:] == (48,) for batch in batches)
    assert len(batches[0]["input_ids"]) == 3
    windows = torch.cat([batch["input_ids"] for batch in batches])
    expected = torch.tensor(list(read_split(book, 0, 0.8).encode())).unfold(0, 48, 48)
    decoded = [make_data().tokenizer.decode(window).encode() for window in windows]
    assert sorted(decoded) == sorted(bytes(window.tolist()) for window in expected)


def test_train_windows_are_shuffled_anew_in_every_epoch(make_data: Any) -> None:
    loader = make_data(training={"batch_size": 1000}).train_dataloader()
    assert isinstance(loader.sampler, DistributedSampler)
    first = next(iter(loader))["input_ids"]
    loader.sampler.set_epoch(1)  # Lightning does so
    second = next(iter(loader))["input_ids"]
    assert not torch.equal(first, second)
    assert torch.equal(first.sort(0).values, second.sort(0).values)


def test_training_is_limited_to_the_first_tokens(make_data: Any, book: Path) -> None:
    data = make_data(training={"tokens": 500})
    text = read_split(book, 0, 0.8)[:480]
    assert len(data.train_dataloader().dataset) == 10
    for batch in data.train_dataloader():
        assert all(data.tokenizer.decode(window) in text for window in batch["input_ids"])


@pytest.mark.parametrize(
    ("group", "name"),
    [
        ("calibration", "windows"),
        ("calibration", "batch_size"),
        ("training", "tokens"),
        ("training", "batch_size"),
        ("evaluation", "tokens"),
        ("evaluation", "batch_size"),
    ],
)
@pytest.mark.parametrize("size", [0, -1])
def test_setting_below_one_is_refused_by_name(make_data: Any, group: str, name: str, size: int) -> None:
    with pytest.raises(ValueError, match=rf"data\.{group}\.{name} must be at least 1, got {size}"):
        make_data(**{group: {name: size}})


@pytest.mark.parametrize(
    ("stream", "group", "name", "size"),
    [
        ("calibration_batches", "calibration", "window", 1),
        ("train_dataloader", "training", "window", 0),
        ("val_dataloader", "evaluation", "window", 1),
        ("val_dataloader", "evaluation", "stride", 0),
        ("test_dataloader", "evaluation", "stride", 65),
    ],
)
def test_window_or_stride_out_of_bounds_is_refused_before_it_is_used(
    make_data: Any, stream: str, group: str, name: str, size: int
) -> None:
    with pytest.raises(ValueError, match=rf"{name} {size}\b"):
        getattr(make_data(**{group: {name: size}}), stream)()


@pytest.mark.parametrize(
    ("stream", "group"),
    [
        ("calibration_batches", "calibration"),
        ("train_dataloader", "training"),
        ("val_dataloader", "evaluation"),
        ("test_dataloader", "evaluation"),
        ("evaluation_batches", "evaluation"),
    ],
)
def test_corpus_shorter_than_one_window_is_refused_by_name(make_data: Any, stream: str, group: str) -> None:
    with pytest.raises(ValueError, match=r"corpus .*book\.txt@\w+: .* do not fill one window of 10000"):
        getattr(make_data(**{group: {"window": 10_000}}), stream)()


def test_unknown_split_is_refused_at_once(make_data: Any) -> None:
    with pytest.raises(ValueError, match="no split 'dev'"):
        make_data(evaluation={"val": ["embedded@dev"]})


@pytest.mark.parametrize("stream", ["val_dataloader", "test_dataloader"])
@pytest.mark.parametrize("world_size", [3, 8, 50])
def test_every_rank_gets_as_many_windows_and_no_token_counts_twice(
    make_data: Any, stream: str, world_size: int
) -> None:
    alone = getattr(make_data(evaluation={"tokens": 11 * 64}), stream)()[0].dataset
    data = make_data(evaluation={"tokens": 11 * 64})
    data.trainer = SimpleNamespace(world_size=world_size)
    filled = getattr(data, stream)()[0].dataset
    assert len(alone) == 11
    assert len(filled) % world_size == 0
    assert 0 < len(filled) - len(alone) < world_size
    assert torch.equal(filled.labels[filled.labels != IGNORED], alone.labels[alone.labels != IGNORED])
    assert filled.input_ids.shape == filled.labels.shape
    assert filled.input_ids.min() >= 0


def test_windows_that_divide_evenly_are_left_alone(make_data: Any) -> None:
    data = make_data(evaluation={"tokens": 6 * 64})
    data.trainer = SimpleNamespace(world_size=3)
    assert len(data.val_dataloader()[0].dataset) == 6


def test_prompts_come_one_by_one_without_padding(make_data: Any) -> None:
    prompts = ["Once upon a time", "Yes", "Größe 42"]
    data = make_data(prompts=prompts)
    batches = list(data.predict_dataloader())
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(1, len(text.encode())) for text in prompts]
    assert [data.tokenizer.decode(batch["input_ids"][0]) for batch in batches] == prompts
    assert all(set(batch) == {"input_ids"} for batch in batches)


@pytest.mark.parametrize(
    ("settings", "protocol"),
    [
        ({}, "perplexity: token-weighted, non-overlapping windows of 64 tokens, whole split"),
        (
            {"evaluation": {"stride": 16}},
            "perplexity: token-weighted, windows with stride 16 of 64 tokens, whole split",
        ),
        (
            {"evaluation": {"tokens": 20_000}},
            "perplexity: token-weighted, non-overlapping windows of 64 tokens, first 20,000 tokens",
        ),
    ],
)
def test_protocol_says_how_perplexity_is_measured(make_data: Any, settings: dict[str, int], protocol: str) -> None:
    assert make_data(**settings).protocol == protocol


def test_tokenizer_is_the_one_of_the_model(make_data: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    assert make_data().tokenizer.get_vocab() == tokenizer.get_vocab()


def test_tokenizers_with_code_of_their_own_are_read_where_that_is_trusted(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    shutil.copytree(tiny_folder, folder)
    (folder / "own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\nclass Own(PreTrainedTokenizerFast): pass"
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert type(TextDataModule(str(folder), trust_remote_code=True).tokenizer).__name__ == "Own"
    with pytest.raises(ValueError, match="custom code"):
        TextDataModule(str(folder)).tokenizer  # noqa: B018
    settings = ["--model.pretrained", str(folder), "--model.trust_remote_code", "true", "--trainer.accelerator", "cpu"]
    assert PruningCLI(run=False, args=settings).datamodule.trust_remote_code


@pytest.fixture(scope="module")
def gemma_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Gemma, to read only."""
    folder = tmp_path_factory.mktemp("gemma") / "gemma"
    gqaprune.save(make_model("gemma3"), make_tokenizer(adds_bos=True), folder)
    return folder


def list_windows(data: TextDataModule, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Token ids of every stream, window by window or prompt by prompt."""
    data.sample_train_windows(model)
    evaluation = data.evaluation_batches()
    return {
        "calibration": torch.cat(data.calibration_batches(model)),
        "held out": torch.cat([batch["input_ids"] for batch in data.held_out_batches()]),
        "train": data.read_train_windows(),
        "train loader": torch.cat([batch["input_ids"] for batch in data.train_dataloader()]),
        **{name: torch.cat([batch["input_ids"] for batch in batches]) for name, batches in evaluation.items()},
        "val loader": torch.cat([batch["input_ids"] for batch in data.val_dataloader()[0]]),
        "prompts": torch.cat([batch["input_ids"][:, :1] for batch in data.predict_dataloader()]),
    }


@pytest.mark.parametrize(("bos", "begins"), [(None, True), (False, False)])
def test_windows_of_every_stream_begin_with_bos_as_the_family_or_the_setting_says(
    gemma_folder: Path,
    make_data: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bos: bool | None,
    begins: bool,
) -> None:
    monkeypatch.setattr("gqaprune.datamodules.text.sample_from_model", partial(sample_from_model, cache=tmp_path))
    settings = {
        "calibration": {"sampled_windows": 4, "held_out_windows": 4},
        "training": {"sampled_windows": 4},
        "sampling": {"document": 20, "prompts": ["Line"]},
    }
    data = make_data(**settings, tokenizer=str(gemma_folder), bos=bos)
    for name, ids in list_windows(data, load_model(gemma_folder)).items():
        assert ids.shape[1] in (1, 32, 48, 64)
        share = float((ids[:, 0] == 256).float().mean())
        assert share == 1 if begins or name == "prompts" else share < 0.7, name
    words = "each beginning with BOS" if begins else "only the first beginning with BOS"
    assert f"windows of 64 tokens, {words}, whole split" in data.protocol


def test_a_token_that_is_scored_is_scored_once_with_bos_as_without(gemma_folder: Path, make_data: Any) -> None:
    data = make_data(tokenizer=str(gemma_folder), evaluation={"batch_size": 3})
    batches = data.evaluation_batches()["val/book"]
    labels = torch.cat([batch["labels"] for batch in batches])
    assert (labels[:, 0] == IGNORED).all()
    tokens = data.tokenizer(data_text(make_data), add_special_tokens=False)["input_ids"]
    assert labels[:, 1:].flatten().tolist() == tokens[: labels[:, 1:].numel()]


def data_text(make_data: Any) -> str:
    """The validation split that `make_data` reads."""
    (corpus,) = make_data().corpora["val"]
    return SEPARATOR.join(read_corpus(corpus))
