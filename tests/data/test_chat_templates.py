"""Labels under templates like those of four families, compared with the marks of the same templates."""

from typing import Any

import pytest

from gqaprune.data.conversations import encode_conversations
from gqaprune.data.examples import Conversation
from gqaprune.models.losses import IGNORED

from tiny import make_tokenizer

EACH = "{% for message in messages %}HEAD{{ BODY }}TAIL{% endfor %}"
SYSTEM = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nHelp.<|im_end|>\n' }}{% endif %}"
SHAPES = {
    "chatml": (
        SYSTEM + EACH + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
        "{{ '<|im_start|>' + message.role + '\n' }}",
        "message.content + '<|im_end|>'",
        "{{ '\n' }}",
    ),
    "llama 3": (
        "{{ bos_token }}" + EACH + "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}",
        "{{ '<|start|>' + message.role + '<|end|>\n\n' }}",
        "message.content | trim + '<|im_end|>'",
        "",
    ),
    "mistral": (  # the system prompt moves to the last message if that is the user's
        "{{ bos_token }}{% set first = messages[0].content if messages[0].role == 'system' else '' %}" + EACH,
        "{% if message.role == 'user' %}{{ '[INST] ' + (first if loop.last else '') }}{% endif %}",
        "message.content + '[/INST]' if message.role == 'user' else ' ' + message.content | trim + '<|im_end|>' "
        "if message.role == 'assistant' else ''",
        "",
    ),
    "gemma": (
        "{{ bos_token }}" + EACH + "{% if add_generation_prompt %}{{ '<|start|>model\n' }}{% endif %}",
        "{{ '<|start|>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}",
        "message.content | trim + '<|im_end|>'",
        "{{ '\n' }}",
    ),
}
"""Templates like those of four families: text, and the head, the body and the tail of each turn."""


def say(*turns: str) -> list[dict[str, Any]]:
    roles = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns]


CHATS = {
    "several": say("u:Hi", "a:Hello!", "u:2+2?", "a:4"),
    "system": say("s:Be brief.", "u:Hi", "a:Hello!", "u:More", "a:No."),
    "the assistant begins": say("a:Welcome!", "u:Hi", "a:Hello"),
    "the user ends": say("u:Hi", "a:Hello!", "u:bye"),
    "the same again": say("u:yes", "a:yes", "u:yes yes", "a:yes", "u:yes", "a:yes"),
    "empty": say("u:Hi", "a:", "u:?", "a:ok"),
    "spaces": say("u:  a ", "a:  b c  \n", "u:d", "a:\n"),
    "unicode": say("u:Grüß 你好 👩‍👩‍👧", "a:Ça va 😀 \n\n ok"),
    "a tool": say("u:w?", "a:calling", "t:12", "a:It is 12."),
    "special tokens": say("u:<|im_end|>?", "a:a <|im_end|> or </s> here"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_labels_are_those_of_the_same_template_with_marks(shape: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<|start|>", "<|end|>"]})
    text, head, body, tail = SHAPES[shape]
    written = "{{ " + body + " }}"
    marks = (
        "{% if message.role == 'assistant' %}{% generation %}"
        + written
        + "{% endgeneration %}{% else %}"
        + written
        + "{% endif %}"
    )
    bare, marked = (
        text.replace("HEAD", head).replace("{{ BODY }}", one).replace("TAIL", tail) for one in (written, marks)
    )
    tokenizer.chat_template = bare
    found = encode_conversations(tokenizer, [_converse(messages) for messages in CHATS.values()])
    tokenizer.chat_template = marked
    for (name, messages), encoded in zip(CHATS.items(), found, strict=True):
        filled = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        assert encoded.ids == filled["input_ids"], name
        assert [label != IGNORED for label in encoded.labels] == [bool(own) for own in filled["assistant_masks"]], name


def _converse(messages: list[dict[str, Any]]) -> Conversation:
    return Conversation(tuple(messages), tuple(i for i, m in enumerate(messages) if m["role"] == "assistant"))
