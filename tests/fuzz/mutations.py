"""Changes to files that someone else may have written: bytes, JSON values, and texts that blow up."""

import json
from pathlib import Path
from random import Random
from typing import Any

NASTY: tuple[Any, ...] = (
    *(None, True, "", "x", "../../etc/passwd", "/etc/passwd", "http://localhost:1/x", "[/b]", "\x1b]0;x\x07", "\ud800"),
    *(0, -1, 1, 2, 3, 7, 10**9, 2**31, 2**63, 10**400, 0.5, -0.0, 1e308, float("nan"), float("inf")),
    *([], {}, [0], [[[]]], {"a": {}}, ["a"] * 9, [10**8], "a" * 100_000, "{% for i in range(9) %}"),
)
"""Values that a field of JSON may be replaced with, whatever it was."""
TEMPLATES = (
    "{{ '%1000000000d' % 1 }}",
    "{{ messages | tojson(indent=10**9) }}",
    "{{ 'a' * 10**10 }}",
    "{% for i in range(10**9) %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ raise_exception('\\x1b[31m[/b]') }}",
    "{{ 1 / 0 }}",
    "{{ messages[99].content }}",
    "{% include 'x' %}",
    "{% generation %}",
    "{{ 'a' | center(10**10) }}",
    "{{ range(10**7) | join('x' * 10**6) }}",
)
"""Chat templates that fail or would not end."""


def mutate_json(text: str, random: Random) -> str:
    """Replace, drop, add or nest values of a JSON text; a third of the time its bytes."""
    if random.random() < 0.3:
        return mutate_bytes(text.encode(), random).decode("utf-8", "surrogateescape")
    root = {"": json.loads(text)}
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        places = list(_list_places(root))
        holder, key = random.choice(places)
        action = random.choice(("replace",) * 6 + ("drop", "nest", "swap", "deepen"))
        if action == "drop" and holder is not root:
            del holder[key]
        elif action == "nest":
            holder[key] = random.choice(([holder[key]], {"a": holder[key]}, str(holder[key])))
        elif action == "swap":
            other, place = random.choice(places)
            holder[key] = json.loads(json.dumps(other[place]))
        elif action == "deepen":
            holder[key] = json.loads("[" * 900 + "]" * 900)
        else:
            holder[key] = random.choice(NASTY)
    return json.dumps(root[""], ensure_ascii=random.random() < 0.9)


def _list_places(value: Any, depth: int = 50) -> Any:
    """Every place that holds a value in nested lists and objects, long lists by their beginning."""
    keys = list(value) if isinstance(value, dict) else range(min(len(value), 20))
    for key in keys:
        yield value, key
        if isinstance(value[key], (dict, list)) and depth:
            yield from _list_places(value[key], depth - 1)


def mutate_bytes(data: bytes, random: Random, head: int | None = None) -> bytes:
    """Flip, overwrite, cut, insert or repeat bytes.

    Args:
        data: of a file.
        random: chooses.
        head: bytes at the beginning that changes are made in, or null for all.
    """
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 5))):
        end = max(1, min(len(changed), head or len(changed)))
        place = random.randrange(end)
        action = random.choice(("flip", "flip", "number", "cut", "insert", "remove", "fill"))
        if not changed:
            return b""
        if action == "flip":
            changed[place % len(changed)] ^= 1 << random.randrange(8)
        elif action == "number":
            number = random.choice((0, 1, 2**31, 2**32 - 1, 2**60, 2**64 - 1))
            changed[place : place + 8] = number.to_bytes(8, "little")
        elif action == "cut":
            del changed[place:]
        elif action == "insert":
            changed[place:place] = random.randbytes(random.choice((1, 8, 100)))
        elif action == "remove":
            del changed[place : place + random.choice((1, 8, 100))]
        else:
            changed[place : place + 8] = random.choice((b"\0", b"\xff")) * 8
    return bytes(changed)


def rewrite_json(file: Path, random: Random) -> None:
    """Change a JSON file in place."""
    file.write_bytes(
        mutate_json(file.read_text(encoding="utf-8"), random).encode(
            "utf-8", "surrogatepass" if random.random() < 0.5 else "replace"
        )
    )
