"""Read rows of local files, one at a time, each with its place for errors."""

import glob
import gzip
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from gqaprune.common.errors import first_line

Row = Mapping[str, Any]

LINES = (".jsonl", ".ndjson", ".jsonlines", ".jl")
"""Endings of files with a row of JSON in each line."""
TABLES = (*LINES, ".json", ".parquet")
"""Endings of files with rows."""
TEXTS = (
    *("", ".txt", ".text", ".md", ".markdown", ".rst", ".tex", ".org", ".raw", ".tokens", ".log"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".java", ".js", ".ts", ".go", ".rs", ".rb", ".sh", ".sql"),
    *(".scala", ".kt", ".swift", ".lua", ".r", ".pl", ".php", ".cs", ".hs", ".html", ".xml", ".yaml", ".yml", ".toml"),
)
"""Endings of files that are read whole, as text."""
KINDS = "txt, md, rst, source code, jsonl, json or parquet, each also with .gz"
_ROWS = 1000
"""Rows of a parquet file in memory at a time; if it is not given, `datasets` refuses files without rows."""


def find_kind(path: Path) -> str:
    """Return the ending of a file's name, in lower case, without `.gz`."""
    return (Path(path.stem) if path.suffix.lower() == ".gz" else path).suffix.lower()


def can_be_read(path: Path) -> bool:
    """Return whether a file's ending is one of text or rows."""
    return find_kind(path) in (*TEXTS, *TABLES)


def read_text(path: Path) -> str:
    """Read a text file, without its byte order mark.

    Raises:
        ValueError: if it is not UTF-8, or not of the type that its name says.
    """
    try:
        with _open(path) as file:
            return file.read()
    except UnicodeDecodeError:
        raise _refuse_encoding(path) from None
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not compressed by gzip ({first_line(error)})") from None


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a table, each with its place.

    Raises:
        ValueError: if the file is not of the type that its name says.
    """
    kind = find_kind(path)
    if kind == ".parquet":
        yield from _read_parquet(path)
    elif kind == ".json":
        yield from _read_json(path)
    else:
        yield from _read_lines(path)


def _open(path: Path) -> IO[str]:
    opened: IO[str] = (gzip.open if path.suffix.lower() == ".gz" else open)(path, "rt", encoding="utf-8-sig")
    return opened


def _refuse_encoding(path: Path) -> ValueError:
    return ValueError(f"{path} is not valid UTF-8: use a file of type {KINDS}")


def _read_lines(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    place = f"{path}, line {number}"
                    yield place, _check_row(_parse(line, place), place)
    except UnicodeDecodeError:
        raise _refuse_encoding(path) from None
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not compressed by gzip ({first_line(error)})") from None


def _read_json(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a list, of an object with one list (as in some datasets), or of lines in a misnamed file."""
    text = read_text(path)
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"{path} is not JSON (it is nested too deeply)") from None
    except ValueError:
        yield from _read_lines(path)
        return
    if isinstance(value, dict):
        lists = [own for own in value.values() if isinstance(own, list) and own and isinstance(own[0], dict)]
        value = lists[0] if len(lists) == 1 else [value]
    if not isinstance(value, list):
        raise ValueError(f"{path} must be a list of objects, got {type(value).__name__}")
    for number, row in enumerate(value, start=1):
        yield f"{path}, row {number}", _check_row(row, f"{path}, row {number}")


def _parse(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except (RecursionError, ValueError) as error:
        raise ValueError(f"{place} is not JSON ({getattr(error, 'msg', error)})") from None


def _check_row(row: Any, place: str) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"{place} must be an object, such as one with `text` or `messages`, got {type(row).__name__}")
    return row


def _read_parquet(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        with _open_rows("parquet", path, batch_size=_ROWS) as rows:
            for number, row in enumerate(rows, start=1):
                yield f"{path}, row {number}", row
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a parquet file ({first_line(error)})") from None


@contextmanager
def _open_rows(kind: str, path: Path, **options: Any) -> Iterator[Any]:
    """Iterate over the rows of one local file; files that `datasets` caches meanwhile are removed afterwards."""
    import datasets  # importing it takes a second, and most runs do not need it

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it also logs the errors that it raises
    try:
        with TemporaryDirectory() as cache:
            files = glob.escape(str(path))
            yield datasets.load_dataset(
                kind, data_files=files, split="train", streaming=True, cache_dir=cache, **options
            )
    finally:
        datasets.logging.set_verbosity(verbosity)
