"""Prompts from a list or a file, plain or as a turn of a chat."""

import copy
import json
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from gqaprune.common import limited
from gqaprune.data.prompts import Prompt, encode_prompt, encode_prompts, read_prompts

from tiny import CHAT_TEMPLATE, make_tokenizer

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Sum"}]


@pytest.fixture
def chatty() -> PreTrainedTokenizerFast:
    """A tokenizer with a chat template."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def test_prompts_of_a_list_are_taken_as_they_are() -> None:
    assert read_prompts(["One", " two\n"]) == [Prompt("One"), Prompt(" two\n")]


def test_a_text_file_holds_one_prompt_per_line_without_empty_ones(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("Größe\n\n  \r\nOnce\u2028upon\r\n".encode())
    assert read_prompts(str(tmp_path / "prompts.txt")) == [Prompt("Größe"), Prompt("Once\u2028upon")]


def test_lines_of_a_jsonl_file_are_strings_prompts_or_messages_up_to_the_answer(
    tmp_path: Path,
) -> None:
    answered = [*CHAT, {"role": "assistant", "content": "Two"}]
    lines = ["Plain", {"prompt": "Asked"}, {"messages": CHAT}, {"messages": answered, "id": 7}, CHAT]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    chat = Prompt("Sum", tuple(CHAT))
    assert read_prompts(str(tmp_path / "prompts.jsonl")) == [Prompt("Plain"), Prompt("Asked"), chat, chat, chat]


def test_halves_of_characters_are_replaced_so_that_a_tokenizer_reads_them(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, chatty: PreTrainedTokenizerFast
) -> None:
    half, whole = "x \ud83d y", "x \ufffd y"
    lines = [half, {"prompt": half}, [{"role": "user", "content": half}]]
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    prompts = [*read_prompts([half]), *read_prompts(str(tmp_path / "prompts.jsonl"))]
    assert [prompt.text for prompt in prompts] == [whole] * 4
    assert tokenizer.decode(encode_prompt(tokenizer, prompts[0])["input_ids"][0]) == whole
    assert chatty.decode(encode_prompt(chatty, prompts[3])["input_ids"][0]) == f"user: {whole}\nassistant: "


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("gone.txt", None, "is not a file: use a file with one prompt per line"),
        ("empty.txt", "\n \n", "has no prompt: give at least one"),
        ("latin.txt", b"Gr\xf6\xdfe", "is not valid UTF-8"),
        ("a.jsonl", '"One"\n{"prompt"', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", '{"text": "One"}', "line 1 is not a prompt: write a string, an object with `prompt`"),
        ("a.jsonl", "\n7", "line 2 is not a prompt"),
        ("a.jsonl", '[{"role": "user"}]', "each have a `role` and a `content`"),
        ("a.jsonl", '[{"role": "assistant", "content": "Hi"}]', "no message that an assistant could answer"),
    ],
)
def test_what_is_no_prompt_is_refused_with_its_line(
    tmp_path: Path, name: str, content: str | bytes | None, sentence: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=sentence):
        read_prompts(str(tmp_path / name))


def test_a_chat_template_is_used_where_there_is_one_unless_said_otherwise(
    tokenizer: PreTrainedTokenizerFast, chatty: PreTrainedTokenizerFast
) -> None:
    def read(tokenizer: PreTrainedTokenizerFast, prompt: Prompt, chat: bool | None = None) -> str:
        encoded = encode_prompt(tokenizer, prompt, chat)
        assert set(encoded) == {"input_ids"}
        return str(tokenizer.decode(encoded["input_ids"][0]))

    assert read(tokenizer, Prompt("Hi")) == "Hi"
    assert read(chatty, Prompt("Hi")) == read(chatty, Prompt("Hi"), True) == "user: Hi\nassistant: "
    assert read(chatty, Prompt("Hi"), False) == "Hi"
    messages = Prompt("Sum", tuple(CHAT))
    assert (
        read(chatty, messages) == read(chatty, messages, False) == "user: Hi\nassistant: Yes?\nuser: Sum\nassistant: "
    )


def test_what_a_tokenizer_cannot_wrap_is_refused(
    tokenizer: PreTrainedTokenizerFast, chatty: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="data.chat is true, but the tokenizer has no chat template: use plain text"):
        encode_prompt(tokenizer, Prompt("Hi"), True)
    with pytest.raises(ValueError, match="a prompt is a list of messages, but the tokenizer has no chat template"):
        encode_prompt(tokenizer, Prompt("Sum", tuple(CHAT)))
    with pytest.raises(ValueError, match="refuses the prompt 'Hi': no user here; set data.chat to false"):
        chatty.chat_template = "{{ raise_exception('no user here') }}"
        encode_prompt(chatty, Prompt("Hi"))
    with pytest.raises(ValueError, match="the prompt '' has no tokens: give at least one character"):
        encode_prompt(tokenizer, Prompt(""))


FRAMES = {
    "nothing": ("$A", []),
    "an end": ("$A </s>", []),
    "both": ("<s> $A </s>", [256]),
    "a beginning": ("<s> $A", [256]),
    "two ends": ("$A </s> </s>", []),
}
"""What a tokenizer puts around a text, and the ids before it."""


@pytest.mark.parametrize("frame", list(FRAMES))
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_ends_in_its_own_text_whatever_the_tokenizer_appends(frame: str, side: str) -> None:
    template, before = FRAMES[frame]
    tokenizer = make_tokenizer()
    tokenizer.padding_side, tokenizer.pad_token = side, "</s>"
    backend = tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single=template, special_tokens=[("<s>", 256), ("</s>", 257)])
    backend.enable_padding(direction=side, pad_id=257, pad_token="</s>", length=20)
    bare = make_tokenizer()
    for text in ("Hi", "ends in </s>", "Hi Hi"):
        expected = [*before, *bare(text)["input_ids"]]
        assert encode_prompt(tokenizer, Prompt(text))["input_ids"].tolist() == [expected]
    tokenizer.chat_template = "<s>" + CHAT_TEMPLATE
    encoded = encode_prompt(tokenizer, Prompt("Hi"))["input_ids"][0].tolist()
    assert encoded == [256, *bare("user: Hi\nassistant: ")["input_ids"]]


def test_an_empty_prompt_is_the_beginning_of_text_where_there_is_one() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    assert encode_prompt(tokenizer, Prompt(""))["input_ids"].tolist() == [[256]]


ENDLESS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(9) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% macro m(n) %}{% for i in range(10) %}{{ m(n - 1) if n }}{% endfor %}{% endmacro %}{{ m(30) }}",
    "{{ (7 ** (7 ** 9)) is odd }}",
)
LARGE = (
    "{{ '%1000000000000d'|format(1) }}",
    "{{ '%1000000000000d' % 1 }}",
    "{{ messages|tojson(indent=10**11) }}",
    "{{ 'a' * 10 ** 11 }}",
    "{{ 'a'|center(10 ** 11) }}",
    "{{ (['a' * 10 ** 8] * 10 ** 3)|join('b') }}",
    "{% set n = namespace(x='a' * 2 ** 25) %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{{ 'a'.ljust(10 ** 11) }}",
    "{{ [0] * 10 ** 11 }}",
)
WRONG = {
    "{{ range(10 ** 9)|list }}": "Range too big",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "maximum recursion depth",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "",
    "{{ messages.__class__.__mro__ }}": "access to attribute",
    "{% include 'x' %}": "no loader",
    "{{ 1 / 0 }}": "zero",
    "{{ messages[7].content.x }}": "has no element 7",
    "{{ 1 + 'a' }}": "unsupported operand",
    "{{ messages|nothing }}": "No filter named",
    "{% for": "end of template",
    "{{ raise_exception('a') }}": "a",
    "{{ strftime_now(messages) }}": "",
    "{{ dict(a=1)|tojson(indent='x', a=1) }}": "unexpected keyword",
}


@pytest.mark.parametrize("template", [*ENDLESS, *LARGE, *WRONG])
def test_a_template_that_runs_away_or_fails_ends_in_a_sentence(
    template: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limited, "SECONDS", 0.5)
    hostile = copy.deepcopy(tokenizer)
    hostile.chat_template = template
    reasons = WRONG.get(template, r"it (does not end within 0\.52 s|needs more than 2 GiB of memory)")
    with pytest.raises(ValueError, match=f"^the chat template refuses the prompt 'Hi': .*{reasons}") as caught:
        encode_prompt(hostile, Prompt("Hi"))
    assert str(caught.value).endswith("; set data.chat to false") and len(str(caught.value)) < 500


@pytest.mark.parametrize("template", [7, ["a"], {"b": "c"}, b"d"])
def test_a_template_that_is_no_text_ends_in_a_sentence(template: object, tokenizer: PreTrainedTokenizerFast) -> None:
    hostile = copy.deepcopy(tokenizer)
    hostile.chat_template = template
    with pytest.raises(ValueError, match="^the chat template refuses the prompt 'Hi': .*; set data.chat to false$"):
        encode_prompt(hostile, Prompt("Hi"))


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_prompt_begins_with_one_bos_where_it_is_asked_for(adds_bos: bool) -> None:
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    plain = make_tokenizer()("Hi")["input_ids"]
    assert encode_prompt(tokenizer, Prompt("Hi"), bos=True)["input_ids"].tolist() == [[256, *plain]]
    own = [256, *plain] if adds_bos else plain
    assert encode_prompt(tokenizer, Prompt("Hi"), bos=False)["input_ids"].tolist() == [own]
    assert encode_prompt(tokenizer, Prompt("Hi"))["input_ids"].tolist() == [own]


def test_a_chat_begins_with_one_bos_whether_its_template_has_it_or_not(chatty: PreTrainedTokenizerFast) -> None:
    without = encode_prompt(chatty, Prompt("Hi"), bos=False)["input_ids"][0].tolist()
    assert encode_prompt(chatty, Prompt("Hi"), bos=True)["input_ids"].tolist() == [[256, *without]]
    chatty.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    assert encode_prompt(chatty, Prompt("Hi"), bos=True)["input_ids"].tolist() == [[256, *without]]


def test_prompts_are_filled_in_together_in_their_order_and_the_first_that_is_refused_is_named(
    chatty: PreTrainedTokenizerFast,
) -> None:
    prompts = [Prompt("One"), Prompt("Sum", tuple(CHAT)), Prompt("Three")]
    for chat in (None, True, False):
        together = [encoded["input_ids"].tolist() for encoded in encode_prompts(chatty, prompts, chat)]
        assert together == [encode_prompt(chatty, prompt, chat)["input_ids"].tolist() for prompt in prompts]
    chatty.chat_template += "{{ raise_exception('no') if messages|length == 3 }}"
    with pytest.raises(ValueError, match="^the chat template refuses the prompt 'Sum': no; set"):
        encode_prompts(chatty, prompts)
