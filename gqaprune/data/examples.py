"""Read a dataset's rows as documents, or as conversations whose assistant turns are learned."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gqaprune.common.safe_text import replace_halves

Message = dict[str, Any]
"""`role` and `content` of one turn of a chat, and any other entries that a template reads."""

ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
"""Names of roles in datasets -> names in templates."""
ASSISTANT = "assistant"

COLUMNS = ("text", "messages", "prompt", "completion", "instruction", "input", "output")
"""Columns that are read; `data.columns` gives them other names."""
_OTHER_NAMES = {"messages": ("conversations", "conversation"), "output": ("response",)}


@dataclass(frozen=True)
class Conversation:
    """A chat, some of whose turns are learned.

    Args:
        messages: the turns.
        learned: indexes of the turns that count in the loss.
        plain: prompt and completion as plain text, for tokenizers without a chat template; None if there are none.
    """

    messages: tuple[Message, ...]
    learned: tuple[int, ...]
    plain: tuple[str, str] | None = None


Example = str | Conversation


@dataclass(frozen=True)
class Columns:
    """Names of the columns that hold text.

    Args:
        names: name in `COLUMNS` -> name in the dataset, for columns that have another name there.
    """

    names: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        for name, _ in self.names:
            if name not in COLUMNS:
                raise ValueError(f"data.columns has {name!r}, which is not a column: use {', '.join(COLUMNS)}")

    def read(self, row: Mapping[str, Any], place: str) -> Example | None:
        """Read a row as a document or a conversation; None if it is empty.

        Args:
            row: column -> value.
            place: place of the row, for the error.

        Raises:
            ValueError: if the row has neither a text nor a conversation.
        """
        found = {name: self._find(row, name) for name in COLUMNS}
        if found["messages"] is not None:
            return _read_messages(found["messages"], place)
        if found["prompt"] is not None and found["completion"] is not None:
            return _read_pair(found["prompt"], found["completion"], place)
        if found["instruction"] is not None and found["output"] is not None:
            return _read_triple(found["instruction"], found["input"] or "", found["output"], place)
        if "text" in dict(self.names) or self._name("text") in row:
            return None if found["text"] is None else _read_string(found["text"], self._name("text"), place)
        has = ", ".join(map(str, row)) or "nothing"
        raise ValueError(
            f"{place} has {has}, but no `text`, no `messages`, no `prompt` and `completion`, and no `instruction` and "
            f"`output`: name its columns with data.columns, such as {{text: {next(iter(row), 'body')}}}"
        )

    def _name(self, column: str) -> str:
        return dict(self.names).get(column, column)

    def _find(self, row: Mapping[str, Any], column: str) -> Any:
        names = [self._name(column), *(_OTHER_NAMES.get(column, ()) if column not in dict(self.names) else ())]
        return next((row[name] for name in names if row.get(name) is not None), None)


def _read_string(value: Any, column: str, place: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{place}: column `{column}` holds {type(value).__name__}, not a string")
    return replace_halves(value)


def _read_messages(value: Any, place: str) -> Conversation | None:
    if not isinstance(value, Iterable) or isinstance(value, (str, Mapping)):
        raise ValueError(
            f"{place}: `messages` must be a list of objects with `role` and `content`, got {type(value).__name__}"
        )
    messages = tuple(_read_message(message, place) for message in value)
    learned = tuple(index for index, message in enumerate(messages) if message["role"] == ASSISTANT)
    if messages and not learned:
        raise ValueError(f"{place} has no message of the assistant to learn: leave it out")
    return Conversation(messages, learned) if messages else None


def _read_message(message: Any, place: str) -> Message:
    if isinstance(message, Mapping):
        role, content = (
            message.get(name, message.get(other)) for name, other in (("role", "from"), ("content", "value"))
        )
        if isinstance(content, list):  # of several parts, a language model reads the texts
            content = "".join(part.get("text") or "" for part in content if isinstance(part, Mapping))
        if content is None and message.get("tool_calls"):
            content = ""  # a template writes the calls
        if isinstance(role, str) and isinstance(content, str):
            extras = {
                key: extra
                for key, extra in message.items()
                if key not in ("from", "value", "role", "content") and extra
            }
            return {"role": ROLES.get(role, role), "content": replace_halves(content), **extras}
    raise ValueError(f"{place} has a message that is not an object with the strings `role` and `content`")


def _read_pair(prompt: Any, completion: Any, place: str) -> Conversation:
    if isinstance(prompt, str) and isinstance(completion, str):
        texts = replace_halves(prompt), replace_halves(completion)
        return Conversation(_make_turns(*texts), (1,), texts)
    if isinstance(prompt, str) or isinstance(completion, str):
        raise ValueError(f"{place}: `prompt` and `completion` must be two strings or two lists of messages")
    before, after = ([_read_message(message, place) for message in value] for value in (prompt, completion))
    learned = [index for index, message in enumerate(after, len(before)) if message["role"] == ASSISTANT]
    if not learned:
        raise ValueError(f"{place} has no message of the assistant in its `completion`")
    return Conversation((*before, *after), tuple(learned))


def _read_triple(instruction: Any, given: Any, output: Any, place: str) -> Conversation:
    texts = [
        _read_string(*pair, place) for pair in ((instruction, "instruction"), (given, "input"), (output, "output"))
    ]
    question = "\n\n".join(filter(None, texts[:2]))
    asked = f"### Instruction:\n{texts[0]}\n\n" + (f"### Input:\n{texts[1]}\n\n" if texts[1] else "")
    return Conversation(_make_turns(question, texts[2]), (1,), (f"{asked}### Response:\n", texts[2]))


def _make_turns(question: str, answer: str) -> tuple[Message, ...]:
    return {"role": "user", "content": question}, {"role": ASSISTANT, "content": answer}
