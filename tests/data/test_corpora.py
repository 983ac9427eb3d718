"""Corpora: names and splits, files of every kind, embedded text, the hub; a sentence for what cannot be read."""

import gzip
import json
import sysconfig
from collections.abc import Iterable
from itertools import chain, combinations
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gqaprune.data.corpora import EMBEDDED, HUB, SEPARATOR, SPLITS, Corpus, parse_corpus, read_corpus
from gqaprune.data.examples import Conversation


def write_jsonl(path: Path, documents: Iterable[str]) -> Path:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents), encoding="utf-8")
    return path


def write_parquet(path: Path, **columns: list[Any]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def write_text(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def read(text: str | Path, default_split: str = "train") -> list[str]:
    return list(read_corpus(parse_corpus(str(text), default_split)))


@pytest.mark.parametrize(
    ("text", "corpus"),
    [
        ("wikitext2", Corpus("wikitext2", "validation")),
        ("wikitext2@test", Corpus("wikitext2", "test")),
        ("ptb@train", Corpus("ptb", "train")),
        ("c4", Corpus("c4", "validation")),
        ("embedded", Corpus("embedded", "validation")),
        ("stdlib", Corpus("stdlib", "validation")),
        ("embedded@train", Corpus("embedded", "train")),
        ("texts/*.jsonl", Corpus("texts/*.jsonl", "all")),
        ("book.txt@train", Corpus("book.txt", "train")),
        ("book.txt@all", Corpus("book.txt", "all")),
        ("me@home/book.txt@test", Corpus("me@home/book.txt", "test")),
    ],
)
def test_named_corpora_take_the_default_split_and_files_are_read_whole(text: str, corpus: Corpus) -> None:
    assert parse_corpus(text, "validation") == corpus


@pytest.mark.parametrize(
    "text", ["wikitext2@dev", "embedded@all", "stdlib@all", "wikitext2@all", "book.txt@dev", "book.txt@"]
)
def test_unknown_split_is_refused_with_those_there_are(text: str) -> None:
    with pytest.raises(ValueError, match=f"corpus '{text}': no split .*train, validation, test"):
        parse_corpus(text, "train")


@pytest.mark.parametrize(("text", "default"), [("c4@test", "train"), ("c4", "test")])
def test_c4_has_no_test_split_and_says_what_to_write(text: str, default: str) -> None:
    with pytest.raises(ValueError, match="use c4@validation"):
        parse_corpus(text, default)


def test_corpus_reads_back_from_its_own_name() -> None:
    for corpus in (Corpus("ptb", "test"), Corpus("a/b.txt", "all")):
        assert parse_corpus(str(corpus), "train") == corpus


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("wikitext2", "wikitext2"),
        ("embedded", "embedded"),
        ("stdlib", "stdlib"),
        ("texts/book.txt", "book"),
        ("texts/*.jsonl", "all"),
    ],
)
def test_label_is_the_name_or_the_stem_of_the_path(name: str, label: str) -> None:
    assert Corpus(name, "train").label == label


def test_splits_overlap_with_themselves_and_with_the_whole_only() -> None:
    for one, other in combinations(SPLITS, 2):
        assert not Corpus(EMBEDDED, one).overlaps(Corpus(EMBEDDED, other))
        assert Corpus("book.txt", one).overlaps(Corpus("book.txt", "all"))
        assert Corpus("book.txt", "all").overlaps(Corpus("book.txt", one))
        assert Corpus("ptb", one).overlaps(Corpus("ptb", one))


def test_different_corpora_do_not_overlap() -> None:
    assert not Corpus("ptb", "train").overlaps(Corpus("wikitext2", "train"))
    assert not Corpus("a.txt", "all").overlaps(Corpus("b.txt", "all"))


def test_one_file_in_two_spellings_overlaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts").mkdir()
    path = write_text(tmp_path / "texts" / "book.txt", "words")
    (tmp_path / "link.txt").symlink_to(path)
    monkeypatch.chdir(tmp_path)
    spellings = [str(path), "texts/book.txt", "./texts/../texts/book.txt", "texts/*.txt", "**/book.txt", "link.txt"]
    for one, other in combinations(spellings, 2):
        assert Corpus(one, "all").overlaps(Corpus(other, "train")), (one, other)


def test_globs_overlap_where_they_share_a_file(tmp_path: Path) -> None:
    for name in ("a1.txt", "a2.txt", "b2.txt"):
        write_text(tmp_path / name, "words")
    assert Corpus(f"{tmp_path}/a*.txt", "all").overlaps(Corpus(f"{tmp_path}/*2.txt", "all"))
    assert not Corpus(f"{tmp_path}/a*.txt", "all").overlaps(Corpus(f"{tmp_path}/b*.txt", "all"))


def test_embedded_splits_are_disjoint_in_order_and_together_the_whole_text() -> None:
    from pydoc_data.topics import topics

    splits = [SEPARATOR.join(read(f"embedded@{split}")) for split in SPLITS]
    whole = "".join(splits)
    assert [round(len(split) / len(whole), 2) for split in splits] == [0.8, 0.1, 0.1]
    assert whole.split() == " ".join(topics[name] for name in sorted(topics)).split()


def test_stdlib_splits_are_together_the_sources_and_overlap_with_their_files() -> None:
    folder = sysconfig.get_path("stdlib")
    splits = [SEPARATOR.join(read(f"stdlib@{split}")) for split in SPLITS]
    for source, split in (("abc.py", 0), ("zipimport.py", 2)):
        assert (Path(folder) / source).read_text() in splits[split]
    sizes = [len(split) / sum(map(len, splits)) for split in splits]
    assert sizes == pytest.approx([0.8, 0.1, 0.1], abs=0.03)
    assert Corpus("stdlib", "test").overlaps(Corpus(f"{folder}/*.py", "all"))
    assert not Corpus("stdlib", "test").overlaps(Corpus("stdlib", "train"))
    assert not Corpus("stdlib", "test").overlaps(Corpus(EMBEDDED, "test"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(documents=st.lists(st.text(min_size=1), min_size=1, max_size=8))
def test_splits_of_few_documents_are_together_the_joined_text(tmp_path: Path, documents: list[str]) -> None:
    path = write_jsonl(tmp_path / "few.jsonl", [*documents, "words"])
    whole = "".join("".join(read(f"{path}@{split}")) for split in SPLITS)
    assert whole == SEPARATOR.join([*documents, "words"])


def test_splits_of_many_documents_are_cut_between_documents(tmp_path: Path) -> None:
    documents = [f"document {number}\nof two lines" for number in range(200)]
    path = write_jsonl(tmp_path / "many.jsonl", documents)
    splits = [read(f"{path}@{split}") for split in SPLITS]
    assert list(chain(*splits)) == documents
    assert [len(split) for split in splits] == pytest.approx([160, 20, 20], abs=2)


def test_splits_of_one_text_file_are_disjoint_and_cover_it(tmp_path: Path) -> None:
    lines = [f"line {number}\n" for number in range(1000)]
    path = write_text(tmp_path / "book.txt", "".join(lines))
    splits = ["".join(read(f"{path}@{split}")).splitlines(keepends=True) for split in SPLITS]
    assert list(chain(*splits)) == lines
    assert [len(split) for split in splits] == pytest.approx([800, 100, 100], abs=5)


def test_text_file_is_one_document(tmp_path: Path) -> None:
    assert read(write_text(tmp_path / "book.txt", "erste Zeile\n\nzweite: größer\n")) == [
        "erste Zeile\n\nzweite: größer\n"
    ]


def test_halves_of_characters_are_replaced_and_whole_ones_are_not(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.jsonl", r'{"text": "one \ud83d\n\udc00 \ud83d\ude00\t漢"}')
    assert read(path) == ["one \ufffd\n\ufffd 😀\t漢"]


@pytest.mark.parametrize("name", ["A.CSV", "a.tsv", "a.pdf", "a.safetensors", "a.xlsx.gz"])
def test_files_of_other_kinds_are_not_taken_for_text(tmp_path: Path, name: str) -> None:
    path = write_text(tmp_path / name, "text,more")
    with pytest.raises(
        ValueError, match="is not a text file: use a file of type txt, md, rst, source code, jsonl, json or parq"
    ):
        read_corpus(Corpus(str(path), "all"))


@pytest.mark.parametrize("text", ['[{"text": "one"}, {"text": "two"}]', '{"data": [{"text": "one"}, {"text": "two"}]}'])
def test_json_files_are_lists_of_rows(tmp_path: Path, text: str) -> None:
    assert read(write_text(tmp_path / "a.json", text)) == ["one", "two"]


def test_a_byte_order_mark_is_no_text_and_gzip_is_unpacked(tmp_path: Path) -> None:
    assert read(write_text(tmp_path / "a.txt", "\ufeffone")) == ["one"]
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("two".encode("utf-8-sig")))
    assert read(tmp_path / "b.txt.gz") == ["two"]
    with pytest.raises(ValueError, match="c.txt.gz is not compressed by gzip"):
        read(write_text(tmp_path / "c.txt.gz", "three"))


def test_folders_are_read_whole_but_for_what_is_no_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "home/deep").mkdir(parents=True)
    write_text(tmp_path / "home/a.md", "one")
    write_text(tmp_path / "home/deep/b.jsonl", '{"text": "two"}')
    write_text(tmp_path / "home/picture.png", "none")
    assert read(tmp_path / "home") == ["one", "two"]
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TEXTS", str(tmp_path / "home"))
    assert read("~/a.md") == read("$TEXTS/a.md") == ["one"]


def test_the_sign_of_splits_may_be_in_a_path(tmp_path: Path) -> None:
    (tmp_path / "v@2").mkdir()
    write_text(tmp_path / "v@2/a.txt", "one")
    assert read(tmp_path / "v@2/a.txt") == read(tmp_path / "v@2") == ["one"]


def test_documents_and_conversations_are_two_corpora(tmp_path: Path) -> None:
    write_text(tmp_path / "a.jsonl", '{"text": "one"}')
    write_text(tmp_path / "b.jsonl", '{"prompt": "one", "completion": "two"}')
    with pytest.raises(ValueError, match="mixes documents and conversations: name the files of each kind"):
        read(f"{tmp_path}/*.jsonl")


def test_jsonl_file_is_a_document_a_line_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = write_text(tmp_path / "a.jsonl", '{"text": "one", "id": 1}\n\n{"text": "zwei\\nZeilen ü"}')
    assert read(path) == ["one", "zwei\nZeilen ü"]


def test_parquet_file_is_a_document_a_row_and_nulls_are_skipped(tmp_path: Path) -> None:
    assert read(write_parquet(tmp_path / "a.parquet", id=[1, 2, 3], text=["one", None, "drei ü"])) == ["one", "drei ü"]


def test_glob_reads_files_of_every_kind_in_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write_text(tmp_path / "c.txt", "four")
    write_parquet(tmp_path / "b.parquet", text=["three"])
    write_jsonl(tmp_path / "a.jsonl", ["one", "two"])
    write_text(tmp_path / "deep" / "d.txt", "five")
    assert read(f"{tmp_path}/*") == ["one", "two", "three", "four"]
    assert read(f"{tmp_path}/**/*.txt") == ["four", "five"]


def test_file_whose_name_looks_like_a_glob_is_read_as_named(tmp_path: Path) -> None:
    write_text(tmp_path / "a1.txt", "the match")
    assert read(write_text(tmp_path / "a[1].txt", "the file")) == ["the file"]


@pytest.mark.parametrize("name", ["gone.txt", "gone/*.jsonl", "wikitext"])
def test_missing_file_is_refused_with_the_corpora_there_are(tmp_path: Path, name: str) -> None:
    with pytest.raises(
        ValueError, match=r"no corpus or file '.*': use a named corpus .*c4, embedded, stdlib\), hub:owner"
    ):
        read(tmp_path / name)


@pytest.mark.parametrize("text", ["", " \n\n\t "], ids=["empty", "blank"])
@pytest.mark.parametrize("split", ["", "@train"])
def test_file_without_text_is_refused(tmp_path: Path, text: str, split: str) -> None:
    path = write_text(tmp_path / "empty.txt", text)
    with pytest.raises(ValueError, match=r"empty\.txt' holds no text"):
        read(f"{path}{split}")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_file_that_is_not_utf_8_is_refused_by_name(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes('{"text": "größer"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match="is not valid UTF-8") as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("line", ["{'text': 'single quotes'}", '{"text": "cut'])
def test_line_that_is_not_json_is_refused_with_its_number(tmp_path: Path, line: str) -> None:
    path = write_text(tmp_path / "a.jsonl", f'{{"text": "one"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl, line 3 is not JSON"):
        read(path)


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ('{"content": "x"}', " has content, but no `text`, .*: name its columns with data.columns"),
        ('{"text": 3}', ": column `text` holds int, not a string"),
        ('"text"', " must be an object, .*, got str"),
        ('["text"]', " must be an object, .*, got list"),
    ],
)
def test_line_without_a_text_field_is_refused_with_its_number(tmp_path: Path, line: str, wrong: str) -> None:
    path = write_text(tmp_path / "a.jsonl", f'{{"text": "one"}}\n{line}\n')
    with pytest.raises(ValueError, match=rf"a\.jsonl, line 2{wrong}"):
        read(path)


def test_parquet_without_a_text_column_is_refused_with_those_it_has(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", id=[1], content=["x"])
    with pytest.raises(ValueError, match=r"a\.parquet, row 1 has id, content, but no `text`"):
        read(path)


def test_parquet_whose_text_column_is_no_text_is_refused_by_name(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=[1, 2])
    with pytest.raises(ValueError, match=r"a\.parquet"):
        read(path)


@pytest.mark.parametrize("column", [[["a"]], [{"a": 1}], [b"a"]], ids=["lists", "structs", "bytes"])
def test_parquet_whose_text_column_holds_something_else_is_refused_with_that(tmp_path: Path, column: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"a\.parquet, row 1: column `text` holds .*, not a string"):
        read(write_parquet(tmp_path / "a.parquet", text=column))


def test_parquet_without_rows_holds_no_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.parquet' holds no text"):
        read(write_parquet(tmp_path / "a.parquet", text=pa.array([], pa.string())))


def test_file_that_is_not_parquet_is_refused_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ValueError, match=r"a\.parquet is not a parquet file"):
        read(write_text(tmp_path / "a.parquet", "just text, named wrongly"))
    assert caplog.messages == []  # all is in the sentence


@pytest.mark.parametrize("text", ["2024-05-01", "12", "true", "null", "a\u2028b\x85c"])
def test_text_stays_text_whatever_it_looks_like(tmp_path: Path, text: str) -> None:
    documents = [text, text]
    line = json.dumps({"text": text, "type": "user", "message": {"id": 1}}, ensure_ascii=False) + "\n"
    assert read(write_text(tmp_path / "a.jsonl", line * 2)) == documents
    assert read(write_parquet(tmp_path / "a.parquet", text=documents)) == documents


def test_lines_may_differ_in_their_other_fields(tmp_path: Path) -> None:
    rows = [{"text": "one", "id": 1}, {"id": {"a": []}, "text": "two"}, {"more": None, "text": "three"}]
    path = write_text(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert read(path) == ["one", "two", "three"]


def test_reading_files_leaves_nothing_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    folder = tmp_path / ".hidden/[1]*"  # names that patterns would take for something else
    folder.mkdir(parents=True)
    assert read(write_jsonl(folder / "a.jsonl", ["one"])) + read(write_parquet(folder / "b.parquet", text=["two"])) == [
        "one",
        "two",
    ]
    assert not cache.exists() and list((tmp_path / "temporary").iterdir()) == []
    assert {path.name for path in folder.iterdir()} == {"a.jsonl", "b.parquet"}


def test_parquet_file_with_a_broken_footer_is_refused_by_name(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=["one"])
    content = path.read_bytes()
    path.write_bytes(content[:-12] + b"\xff" * 4 + content[-8:])
    with pytest.raises(ValueError, match=r"a\.parquet is not a parquet file"):
        read(path)


class Hub:
    """Stands in for the hub: real datasets from memory, and the last request."""

    def __init__(self, **columns: list[str]) -> None:
        self.dataset = datasets.Dataset.from_dict(columns)
        self.path = ""
        self.request: dict[str, Any] = {}

    def load(self, path: str, **request: Any) -> Any:
        self.path, self.request = path, request
        return self.dataset.to_iterable_dataset() if request.get("streaming") else self.dataset


def test_wikitext2_gives_the_text_of_the_split_that_was_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(text=["", " = Title = \n", "words\n"], url=["a", "b", "c"])
    monkeypatch.setattr(datasets, "load_dataset", hub.load)
    assert read("wikitext2@validation") == ["", " = Title = \n", "words\n"]
    assert (hub.path, hub.request) == (
        "Salesforce/wikitext",
        {"name": "wikitext-2-raw-v1", "split": "validation"},
    )


def test_ptb_gives_the_sentences_of_the_converted_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(sentence=["one", "two"])
    monkeypatch.setattr(datasets, "load_dataset", hub.load)
    assert read("ptb", "test") == ["one", "two"]
    assert hub.request["split"] == "test"
    assert hub.request["revision"] == "refs/convert/parquet"


def test_c4_streams_one_file_of_the_split(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(text=["one", "two"])
    monkeypatch.setattr(datasets, "load_dataset", hub.load)
    assert read("c4", "validation") == ["one", "two"]
    assert hub.request["streaming"] is True
    assert hub.request["split"] == "validation"
    assert hub.request["data_files"] == {"validation": "en/c4-validation.00000-of-00008.json.gz"}


@pytest.mark.parametrize(
    ("text", "asked"),
    [
        ("hub:org/chats@train_sft", {"split": "train_sft"}),
        ("hub:org/chats/en", {"split": "validation", "name": "en"}),
    ],
)
def test_any_dataset_of_the_hub_is_read_with_its_columns(
    monkeypatch: pytest.MonkeyPatch, text: str, asked: dict[str, str]
) -> None:
    hub = Hub(prompt=["one"], completion=["two"])
    monkeypatch.setattr(datasets, "load_dataset", hub.load)
    (found,) = read_corpus(parse_corpus(text, "validation"))
    assert isinstance(found, Conversation) and found.messages[1]["content"] == "two"
    assert asked.items() <= hub.request.items()


def test_a_name_of_the_hub_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="write hub:owner/dataset@split or hub:owner/dataset/config@split"):
        read("hub:chats")


@pytest.mark.parametrize("name", list(HUB))
@pytest.mark.parametrize("reason", ["no route to host\nand much more", ""], ids=["with reason", "without reason"])
def test_hub_that_cannot_be_reached_gives_a_sentence_with_a_way_out(
    monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    def fail(path: str, **request: Any) -> None:
        raise ConnectionError(reason)

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(
        ValueError,
        match=f"corpus '{name}' could not be read .*local file or folder, use 'embedded', or set HF_ENDPOINT",
    ) as caught:
        read(name)
    assert "and much more" not in str(caught.value)
    if reason:
        assert "(no route to host)" in str(caught.value)
