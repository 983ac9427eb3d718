"""Named corpora and their splits, as lists of documents.

A corpus is written `name`, `name@split` or a path: `wikitext2`, `ptb@validation`, `texts/*.jsonl`, `book.txt@train`.
`embedded` and `stdlib` are texts that every Python carries.
"""

import glob
import inspect
import json
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from gqaprune.common.errors import first_line

SPLITS = ("train", "validation", "test")
SEPARATOR = "\n\n"
"""Joins the documents of a corpus, as published perplexities have it."""

_SHARES = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}


@dataclass(frozen=True)
class HubDataset:
    """Where a corpus is on the Hugging Face hub.

    Args:
        path: dataset repository or builder.
        column: the text column.
        config: name of the dataset's configuration.
        data_files: split -> file, where the repository is not read whole.
        revision: branch to read.
        streaming: whether documents come one by one, for what is too large to download.
    """

    path: str
    column: str
    config: str | None = None
    data_files: Mapping[str, str] | None = None
    revision: str | None = None
    streaming: bool = False


HUB: Mapping[str, HubDataset] = {
    "wikitext2": HubDataset("Salesforce/wikitext", "text", config="wikitext-2-raw-v1"),
    # The repository itself is a loading script, which `datasets` no longer runs; this is its converted branch.
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

EMBEDDED = "embedded"
"""A text that every Python carries: `pydoc_data.topics`, about 0.7 MB of English prose on the language."""
STDLIB = "stdlib"
"""Another, unlike it: the sources of the standard library's own modules, about 4 MB of code."""


@dataclass(frozen=True)
class Corpus:
    """A corpus and one of its splits.

    Args:
        name: a name in `HUB`, `embedded`, `stdlib`, or a path or glob of txt, jsonl or parquet files.
        split: `train`, `validation`, `test`, or `all` of a local file.
    """

    name: str
    split: str

    def __str__(self) -> str:
        return f"{self.name}@{self.split}"

    @property
    def label(self) -> str:
        """Short name for logs: the corpus's name, or the stem of its path."""
        return self.name if self.name in (*_LOCAL, *HUB) else Path(self.name).stem.replace("*", "all")

    def overlaps(self, other: "Corpus") -> bool:
        """Whether the two share text: a source in common and the same split, or the whole of it."""
        same_split = self.split == other.split or "all" in (self.split, other.split)
        return same_split and not _sources(self.name).isdisjoint(_sources(other.name))


def parse_corpus(text: str, default_split: str) -> Corpus:
    """Read `name`, `name@split` or a path.

    Args:
        text: what the user wrote.
        default_split: split of a named corpus that has none; local files are read whole.

    Raises:
        ValueError: if the split does not exist.
    """
    name, at, split = text.rpartition("@")
    if not at:
        name, split = text, default_split if text in (*_LOCAL, *HUB) else "all"
    if split not in SPLITS and (split != "all" or name in (*_LOCAL, *HUB)):
        raise ValueError(
            f"corpus {text!r}: no split {split!r}; splits are {', '.join(SPLITS)}, and `all` for local files"
        )
    if name == "c4" and split == "test":
        raise ValueError("corpus 'c4' has no test split: write c4@validation")
    return Corpus(name, split)


def read_corpus(corpus: Corpus) -> Iterable[str]:
    """The documents of a corpus, lazily where it is large.

    Local files and what every Python carries are cut into train (80 %), validation and test (10 % each) by position.

    Raises:
        ValueError: if there is no such corpus or file, it holds no text, or the hub cannot be reached.
    """
    if corpus.name in HUB:
        return _read_hub(corpus)
    documents = _LOCAL[corpus.name]() if corpus.name in _LOCAL else _read_files(corpus.name)
    if not any(document.strip() for document in documents):
        raise ValueError(f"corpus {corpus.name!r} holds no text")
    return documents if corpus.split == "all" else _take_share(documents, corpus.split)


def replace_halves(text: str) -> str:
    """A text whose halves of characters, which JSON can spell and no tokenizer reads, are replacement characters."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _read_hub(corpus: Corpus) -> Iterable[str]:
    from datasets import load_dataset  # here and below: importing it takes a second, and most runs need none of it

    source = HUB[corpus.name]
    arguments: dict[str, Any] = {"name": source.config, "revision": source.revision, "split": corpus.split}
    if source.data_files:
        arguments["data_files"] = {corpus.split: source.data_files[corpus.split]}
    if source.streaming:
        arguments["streaming"] = True
    try:
        rows = load_dataset(source.path, **{key: value for key, value in arguments.items() if value is not None})
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"corpus {corpus.name!r} could not be read from the hub or its cache ({first_line(error)}); connect once "
            f"to fill the cache, or give a local file, or {EMBEDDED!r}"
        ) from None
    return (cast(Mapping[str, str], row)[source.column] for row in rows)


def _read_embedded() -> list[str]:
    from pydoc_data.topics import topics

    return [inspect.cleandoc(topics[name]) for name in sorted(topics)]


def _read_stdlib() -> list[str]:
    return [path.read_text(encoding="utf-8") for path in _find_stdlib()]


def _find_stdlib() -> list[Path]:
    return sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))


_LOCAL: Mapping[str, Callable[[], list[str]]] = {EMBEDDED: _read_embedded, STDLIB: _read_stdlib}
"""Corpora that need no hub."""


def _read_files(pattern: str) -> list[str]:
    paths = _expand(pattern)
    if not paths:
        known = ", ".join([*HUB, *_LOCAL])
        raise ValueError(f"no corpus or file {pattern!r}: named corpora are {known}; files are txt, jsonl or parquet")
    documents: list[str] = []
    for path in paths:
        suffix = path.suffix.lower()
        if suffix in _TABLES:
            raise ValueError(f"{path} would be read as plain text: files are txt, jsonl (field `text`) or parquet")
        reader = _READERS.get(suffix, _read_text)
        documents.extend(reader(path))
    return documents


def _read_text(path: Path) -> list[str]:
    try:
        return [path.read_text(encoding="utf-8")]
    except UnicodeDecodeError:
        raise _refuse_encoding(path) from None


def _refuse_encoding(path: Path) -> ValueError:
    return ValueError(f"{path} is not UTF-8 text; give txt, jsonl or parquet")


def _read_jsonl(path: Path) -> list[str]:
    """Read field `text` of every line.

    Lines come from `datasets` as they are: its own reader of JSON takes dates for dates and halves of characters for
    errors, and tells no lines.
    """
    documents = []
    try:
        with _open_rows("text", path) as rows:
            for number, row in enumerate(rows, start=1):
                if row["text"].strip():
                    documents.append(_parse_line(row["text"], f"{path}, line {number}"))
    except UnicodeDecodeError:
        raise _refuse_encoding(path) from None
    return documents


def _parse_line(line: str, place: str) -> str:
    try:
        row = json.loads(line)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{place} is not JSON ({getattr(error, 'msg', error)})") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError(f"{place} has no string field `text`")
    return replace_halves(row["text"])


def _read_parquet(path: Path) -> list[str]:
    from datasets import Value

    try:
        with _open_rows("parquet", path, batch_size=_ROWS) as rows:
            features = rows.features
            if features.get("text") in (Value("string"), Value("large_string")):
                return [row["text"] for row in rows.select_columns("text") if row["text"] is not None]
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a parquet file ({first_line(error)})") from None
    if "text" not in features:
        raise ValueError(f"{path} has no column `text`, it has {', '.join(features)}")
    raise ValueError(f"{path}: its column `text` holds {features['text']}, not strings")


@contextmanager
def _open_rows(kind: str, path: Path, **options: Any) -> Iterator[Any]:
    """Open the rows of one local file, one at a time; what `datasets` notes on disk meanwhile goes afterwards."""
    import datasets

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it raises, which is said in a sentence
    try:
        with TemporaryDirectory() as cache:
            files = glob.escape(str(path))
            yield datasets.load_dataset(
                kind, data_files=files, split="train", streaming=True, cache_dir=cache, **options
            )
    finally:
        datasets.logging.set_verbosity(verbosity)


_ROWS = 1000
"""Rows of a parquet file in memory at a time; without a number `datasets` refuses files that have none."""
_TABLES = {".json", ".csv", ".tsv"}
"""Endings of files whose text is among names, quotes and commas."""
_READERS: Mapping[str, Callable[[Path], list[str]]] = {".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _expand(pattern: str) -> list[Path]:
    if Path(pattern).is_file():
        return [Path(pattern)]
    return [Path(path) for path in sorted(glob.glob(pattern, recursive=True)) if Path(path).is_file()]


def _sources(name: str) -> set[str]:
    if name in (EMBEDDED, *HUB):
        return {name}
    return {str(path.resolve()) for path in (_find_stdlib() if name == STDLIB else _expand(name))} or {name}


def _take_share(documents: Sequence[str], split: str) -> list[str]:
    """Cut at document borders where there are many documents, at line borders where there are few."""
    pieces = list(documents)
    if len(pieces) < 100:
        pieces = SEPARATOR.join(pieces).splitlines(keepends=True)
        return ["".join(islice(pieces, *_bounds(pieces, split)))]
    return pieces[slice(*_bounds(pieces, split))]


def _bounds(pieces: Sequence[str], split: str) -> tuple[int, int]:
    """Indexes of the pieces that hold the split's share of all characters."""
    start, end = _SHARES[split]
    total, seen, edges = sum(map(len, pieces)), 0, [0]
    for piece in pieces:
        seen += len(piece)
        edges.append(seen)
    return _first_at(edges, start * total), _first_at(edges, end * total)


def _first_at(edges: Sequence[int], position: float) -> int:
    return next(index for index, edge in enumerate(edges) if edge >= position)
