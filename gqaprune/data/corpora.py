"""Read corpora and their splits, as documents or conversations.

A corpus is written `name`, `name@split` or a path: `wikitext2`, `ptb@validation`, `texts/*.jsonl`, `book.txt@train`;
`hub:owner/dataset@split` is any dataset on the hub. `embedded` and `stdlib` are texts that come with every Python.
"""

import glob
import inspect
import os
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from gqaprune.common.errors import first_line
from gqaprune.common.paths import expand_path
from gqaprune.data.examples import Columns, Conversation, Example
from gqaprune.data.rows import KINDS, TABLES, can_be_read, find_kind, read_rows, read_text
from gqaprune.models.hub import check_hub

SPLITS = ("train", "validation", "test")
SEPARATOR = "\n\n"
"""Joins the documents of a corpus, as in published perplexities."""

_SHARES = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}


@dataclass(frozen=True)
class HubDataset:
    """Where a corpus is on the Hugging Face hub.

    Args:
        path: dataset repository or builder.
        column: name of the text column; None looks for text and conversations.
        config: name of the dataset's configuration.
        data_files: split -> file, if only these files of the repository are read.
        revision: branch to read.
        streaming: whether to read documents one by one, for datasets that are too large to download.
    """

    path: str
    column: str | None = None
    config: str | None = None
    data_files: Mapping[str, str] | None = None
    revision: str | None = None
    streaming: bool = False


HUB: Mapping[str, HubDataset] = {
    "wikitext2": HubDataset("Salesforce/wikitext", "text", config="wikitext-2-raw-v1"),
    # The repository's main branch has a loading script, which `datasets` no longer runs; this is its converted branch.
    "ptb": HubDataset(
        "ptb-text-only/ptb_text_only",
        "sentence",
        data_files={split: f"penn_treebank/{split}/0000.parquet" for split in SPLITS},
        revision="refs/convert/parquet",
    ),
    "c4": HubDataset(
        "allenai/c4",
        "text",
        data_files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        streaming=True,
    ),
}
"""Corpora read through `datasets`, from the hub or its cache."""

ANY_HUB = "hub:"
"""Prefix of names of other datasets on the hub."""
EMBEDDED = "embedded"
"""A text that comes with every Python: `pydoc_data.topics`, about 0.7 MB of English prose on the language."""
STDLIB = "stdlib"
"""A different text that comes with every Python: the sources of the standard library, about 4 MB of code."""


@dataclass(frozen=True)
class Corpus:
    """A corpus and one of its splits.

    Args:
        name: a name in `HUB`, `hub:owner/dataset`, `embedded`, `stdlib`, or a path, folder or glob of files.
        split: `train`, `validation`, `test`, or `all` for a local file; for a dataset on the hub any of its splits.
        columns: names of the columns that hold text, if they are not the usual ones.
    """

    name: str
    split: str
    columns: Columns = Columns()  # noqa: RUF009  (never changed)

    def __str__(self) -> str:
        return f"{self.name}@{self.split}"

    @property
    def label(self) -> str:
        """Name in logs, which is the corpus's name or the stem of its path."""
        if self.name in (*_LOCAL, *HUB):
            return self.name
        return Path(self.name.removeprefix(ANY_HUB)).stem.replace("*", "all")

    def overlaps(self, other: "Corpus") -> bool:
        """Return whether two corpora share text: they have a common source, and the same split of it or all of it."""
        same_split = self.split == other.split or "all" in (self.split, other.split)
        return same_split and not _sources(self.name).isdisjoint(_sources(other.name))


def parse_corpus(text: str, default_split: str, columns: Columns = Columns()) -> Corpus:  # noqa: B008
    """Parse `name`, `name@split` or a path.

    Args:
        text: the corpus as the user wrote it.
        default_split: split of a named corpus that is written without one; local files are read whole.
        columns: names of the columns that hold text.

    Raises:
        ValueError: if the split does not exist.
    """
    name, at, split = text.rpartition("@")
    is_place = at and (os.sep in split or os.path.exists(expand_path(text)))  # the @ is part of a path
    if not at or is_place:
        is_named = text in (*_LOCAL, *HUB) or text.startswith(ANY_HUB)
        name, split = text, default_split if is_named else "all"
    if name.startswith(ANY_HUB):
        return Corpus(name, split, columns)
    if split not in SPLITS and (split != "all" or name in (*_LOCAL, *HUB)):
        raise ValueError(
            f"corpus {text!r}: no split {split!r}; splits are {', '.join(SPLITS)}, and `all` for local files"
        )
    if name == "c4" and split == "test":
        raise ValueError("corpus 'c4' has no test split: use c4@validation")
    return Corpus(name if name in (*_LOCAL, *HUB) else expand_path(name), split, columns)


def read_corpus(corpus: Corpus) -> Iterable[Example]:
    """Read the documents or conversations of a corpus, lazily if it is large.

    Local files and the texts of Python are divided by position into train (80 %), validation and test (10 % each).

    Raises:
        ValueError: if the corpus or file does not exist or holds no text, or the hub cannot be reached.
    """
    if corpus.name in HUB:
        return _read_hub(corpus, HUB[corpus.name])
    if corpus.name.startswith(ANY_HUB):
        return _read_hub(corpus, _name_dataset(corpus.name))
    examples: Sequence[Example] = (
        _LOCAL[corpus.name]() if corpus.name in _LOCAL else _read_files(corpus.name, corpus.columns)
    )
    if not any(isinstance(example, Conversation) or example.strip() for example in examples):
        raise ValueError(f"corpus {corpus.name!r} holds no text: name a file or folder with text")
    return examples if corpus.split == "all" else _take_share(examples, corpus.split)


def _name_dataset(name: str) -> HubDataset:
    """Parse `hub:owner/dataset` or `hub:owner/dataset/config`."""
    parts = name.removeprefix(ANY_HUB).split("/")
    if len(parts) not in (2, 3) or not all(parts):
        raise ValueError(
            f"corpus {name!r} is not a hub dataset: write hub:owner/dataset@split or hub:owner/dataset/config@split"
        )
    return HubDataset("/".join(parts[:2]), config=parts[2] if len(parts) == 3 else None)


def _read_hub(corpus: Corpus, source: HubDataset) -> Iterable[Example]:
    from datasets import load_dataset  # importing it takes a second, and most runs do not need it

    arguments: dict[str, Any] = {"name": source.config, "revision": source.revision, "split": corpus.split}
    if source.data_files:
        arguments["data_files"] = {corpus.split: source.data_files[corpus.split]}
    if source.streaming:
        arguments["streaming"] = True
    check_hub()
    try:
        rows = load_dataset(source.path, **{key: value for key, value in arguments.items() if value is not None})
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"corpus {corpus.name!r} could not be read from the hub or its cache ({first_line(error)}): use a local "
            f"file or folder, use {EMBEDDED!r}, or set HF_ENDPOINT to a mirror; once downloaded, it stays in the cache"
        ) from None
    if source.column is not None:
        return (row[source.column] for row in rows)
    places = ((corpus.columns.read(row, f"{corpus}, row {number}")) for number, row in enumerate(rows, start=1))
    return (example for example in places if example is not None)


def _read_embedded() -> list[str]:
    from pydoc_data.topics import topics

    return [inspect.cleandoc(topics[name]) for name in sorted(topics)]


def _read_stdlib() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in _find_stdlib()]


def _find_stdlib() -> list[Path]:
    return sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))


_LOCAL: Mapping[str, Callable[[], list[str]]] = {EMBEDDED: _read_embedded, STDLIB: _read_stdlib}
"""Corpora that need no hub."""


def _read_files(pattern: str, columns: Columns) -> list[Example]:
    paths = _expand(pattern)
    if not paths:
        known = ", ".join([*HUB, *_LOCAL])
        raise ValueError(
            f"no corpus or file {pattern!r}: use a named corpus ({known}), {ANY_HUB}owner/dataset, or a file of type "
            f"{KINDS}"
        )
    examples: list[Example] = []
    for path in paths:
        if not can_be_read(path):
            raise ValueError(f"{path} is not a text file: use a file of type {KINDS}")
        if find_kind(path) in TABLES:
            read = (columns.read(row, place) for place, row in read_rows(path))
            examples.extend(example for example in read if example is not None)
        else:
            examples.append(read_text(path))
    kinds = {isinstance(example, Conversation) for example in examples}
    if len(kinds) > 1:
        raise ValueError(
            f"corpus {pattern!r} mixes documents and conversations: name the files of each kind as a corpus of its own"
        )
    return examples


def _expand(pattern: str) -> list[Path]:
    """List the files of a path or a glob, and of a folder those that can be read."""
    place = Path(pattern)
    if place.is_file():
        return [place]
    if place.is_dir():
        return sorted(path for path in place.rglob("*") if path.is_file() and can_be_read(path) and path.name[0] != ".")
    return [Path(path) for path in sorted(glob.glob(pattern, recursive=True)) if Path(path).is_file()]


def _sources(name: str) -> set[str]:
    if name in (EMBEDDED, *HUB) or name.startswith(ANY_HUB):
        return {name}
    return {str(path.resolve()) for path in (_find_stdlib() if name == STDLIB else _expand(name))} or {name}


def _take_share(examples: Sequence[Example], split: str) -> list[Example]:
    """Take a split's share, cut between conversations, between documents if there are many, else between lines."""
    documents = [example for example in examples if isinstance(example, str)]
    if len(documents) < len(examples) or len(documents) >= 100:
        return list(examples[slice(*_bounds([_count_characters(example) for example in examples], split))])
    lines = SEPARATOR.join(documents).splitlines(keepends=True)
    return ["".join(islice(lines, *_bounds([len(line) for line in lines], split)))]


def _count_characters(example: Example) -> int:
    return len(example) if isinstance(example, str) else sum(len(message["content"]) for message in example.messages)


def _bounds(lengths: Sequence[int], split: str) -> tuple[int, int]:
    """Return the indexes between which the pieces hold the split's share of all characters."""
    start, end = _SHARES[split]
    total, seen, edges = sum(lengths), 0, [0]
    for length in lengths:
        seen += length
        edges.append(seen)
    return _first_at(edges, start * total), _first_at(edges, end * total)


def _first_at(edges: Sequence[int], position: float) -> int:
    return next(index for index, edge in enumerate(edges) if edge >= position)
