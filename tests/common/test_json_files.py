import json
import os
from pathlib import Path

import pytest

from gqaprune.common import json_files
from gqaprune.common.json_files import parse_json, read_json


def test_what_json_writes_is_read_back(tmp_path: Path) -> None:
    value = {"rate": 0.25, "layers": [[1, 2], [], {"names": ["é", "😀", "\n"]}], "none": None, "limit": int(1e30)}
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(value))

    assert read_json(path) == value


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": 1', "not JSON"),
        (b"", "not JSON"),
        (b"\x00\x00", "not JSON"),
        (b'\xef\xbb\xbf{"a": 1}', "not JSON (Unexpected UTF-8 BOM"),
        ('{"a": 1}'.encode("utf-16"), "not JSON (its text is not UTF-8)"),
        (b'{"a": "\xff"}', "not JSON (its text is not UTF-8)"),
        (b'{"a": "\xed\xa0\x80"}', "not JSON (its text is not UTF-8)"),
        (b'{"a": "\\ud800"}', "half of a character, \\ud800"),
        (b'{"\\uDC01": 1}', "half of a character, \\udc01"),
        (b'[{"a": 1, "b": 2, "a": 3}]', "key 'a' occurs twice"),
        (b"[NaN]", "number NaN is not finite"),
        (b"[-Infinity]", "number -Infinity is not finite"),
        (b"[1e400]", "number 1e400 is not finite"),
        (b"[1" + b"0" * 400 + b"]", "401 digits, but at most 40"),
        (b"1" * 5000, "5000 digits, but at most 40"),
        (b"[" * 65 + b"]" * 65, "nested more than 64 deep"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested more than 64 deep"),
        (b"[" * 10**6, "nested more than 64 deep"),
        (b"[" * 10**6 + b"]" * 10**6, "nested more than 64 deep"),
    ],
    ids=lambda content: str(content[:20]),
)
def test_what_no_program_should_have_written_is_refused_in_one_line(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)

    with pytest.raises(ValueError) as caught:
        read_json(path, "pruning plan")

    assert str(caught.value).startswith(f"{path} is not a pruning plan: ")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_64_containers_within_each_other_are_read() -> None:
    assert parse_json("[" * 64 + "]" * 64)


def test_both_halves_of_a_character_are_read() -> None:
    assert parse_json(r'"\ud83d\ude00"') == "😀"


def test_a_file_larger_than_any_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "LARGEST_FILE", 2**20)
    path = tmp_path / "plan.json"
    path.write_bytes(b" " * 2**20 + b"1")

    with pytest.raises(ValueError, match="larger than 1 MiB"):
        read_json(path)


def test_what_is_not_a_file_is_refused_unopened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    with pytest.raises(ValueError, match="is not a JSON file: not a file"):
        read_json(tmp_path / "pipe")
    with pytest.raises(ValueError, match="is not a JSON file: not a file"):
        read_json(tmp_path)
    with pytest.raises(ValueError, match="no report at .*none"):
        read_json(tmp_path / "none", "report")
