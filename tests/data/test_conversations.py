"""Conversations: what rows may hold, whose tokens are learned, and how they are packed."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedTokenizerBase

import gqaprune
from gqaprune.data.conversations import (
    Encoded,
    describe_example,
    encode_conversations,
    find_filler,
    pack,
)
from gqaprune.data.corpora import parse_corpus, read_corpus
from gqaprune.data.examples import Columns, Conversation
from gqaprune.data.windows import read_labelled_windows, tokenize_corpus
from gqaprune.datamodules import TextDataModule
from gqaprune.evaluation.perplexity import measure_perplexity
from gqaprune.models.losses import IGNORED
from gqaprune.module import CausalLMModule
from gqaprune.training.objective import Objective
from gqaprune.training.recovery import RecoveryConfig

from tiny import make_model, make_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
]

PLAIN = (
    "{% for m in messages %}{{ m.role + ': ' }}BODY{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
BODY = "{{ m.content + '</s>' }}{{ '\\n' }}"
MARKED = (
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '</s>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '</s>' }}{% endif %}{{ '\\n' }}"
)
THINKING = (
    "{% for m in messages %}{{ m.role + ': ' }}{% if loop.last and m.role == 'assistant' %}{{ '<think></think>' }}"
    "{% endif %}{{ m.content + '</s>' }}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: <think></think>' }}{% endif %}"
)
"""Like Qwen3's: earlier answers lose what the last one has."""
TEMPLATES = {"plain": PLAIN.replace("BODY", BODY), "marked": PLAIN.replace("BODY", MARKED), "thinking": THINKING}


def make_chatting(name: str) -> PreTrainedTokenizerBase:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    return tokenizer


def converse(messages: list[dict[str, Any]] = CHAT) -> Conversation:
    return Conversation(tuple(messages), tuple(i for i, m in enumerate(messages) if m["role"] == "assistant"))


def learn(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> list[str]:
    """The runs of text that have labels."""
    runs, before = [], False
    for token, label in zip(*encoded, strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED and not before:
            runs.append([])
        if label != IGNORED:
            runs[-1].append(token)
        before = label != IGNORED
    return [tokenizer.decode(run) for run in runs]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_assistants_tokens_alone_are_learned_with_the_end_of_each_turn(name: str) -> None:
    tokenizer = make_chatting(name)
    (encoded,) = encode_conversations(tokenizer, [converse()])
    assert encoded.ids == tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert learn(tokenizer, encoded) == ["Hello!</s>", "Four.</s>"]


def test_labels_are_the_templates_own_where_it_marks_them() -> None:
    tokenizer = make_chatting("marked")
    filled = tokenizer.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    (encoded,) = encode_conversations(tokenizer, [converse()])
    assert [label != IGNORED for label in encoded.labels] == [bool(own) for own in filled["assistant_masks"]]


def test_turns_of_calls_alone_are_learned_with_the_calls(tmp_path: Path) -> None:
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    rows = [{"role": "assistant", "content": None, "tool_calls": calls}, {"role": "assistant", "tool_calls": calls}]
    path = tmp_path / "chats.jsonl"
    chats = [{"messages": [CHAT[1], row, {"role": "tool", "content": "2"}, CHAT[4]]} for row in rows]
    path.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    conversations = list(read_corpus(parse_corpus(str(path), "train")))
    called = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    for template in (TEMPLATES["plain"], THINKING):
        tokenizer = make_tokenizer()
        tokenizer.chat_template = template.replace("{{ m.content", called + "{{ m.content")
        for encoded in encode_conversations(tokenizer, conversations):  # type: ignore[arg-type]
            assert [text.strip() for text in learn(tokenizer, encoded)] == ["add</s>", "Four.</s>"]


def test_labels_of_a_real_template_without_marks_are_those_of_the_same_with_marks() -> None:
    tokenizer = gqaprune.load_tokenizer("smollm2-135m")
    (encoded,) = encode_conversations(tokenizer, [converse()])
    assert learn(tokenizer, encoded) == ["Hello!<|im_end|>", "Four.<|im_end|>"]
    assert encoded.ids == tokenizer.apply_chat_template(CHAT)["input_ids"]


def test_all_tokens_are_learned_where_that_is_asked_for() -> None:
    (encoded,) = encode_conversations(make_chatting("plain"), [converse()], "all")
    assert encoded.labels == encoded.ids


def test_completions_of_several_turns_are_learned_and_their_prompts_are_not() -> None:
    columns, row = Columns(), {"prompt": CHAT[:3], "completion": CHAT[3:]}
    conversation = columns.read(row, "row 1")
    assert isinstance(conversation, Conversation)
    tokenizer = make_chatting("plain")
    assert learn(tokenizer, encode_conversations(tokenizer, [conversation])[0]) == ["Four.</s>"]


ROWS: dict[str, tuple[dict[str, Any], str, str]] = {
    "messages": ({"messages": CHAT[:3]}, "system: Be brief.</s>\nuser: Hi</s>\nassistant: ", "Hello!</s>"),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes"}]},
        "user: Hi</s>\nassistant: ",
        "Yes</s>",
    ),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                {"role": "assistant", "content": [{"type": "text", "text": "Hello!"}]},
            ]
        },
        "user: Hi</s>\nassistant: ",
        "Hello!</s>",
    ),
    "pair": ({"prompt": "1+1=", "completion": "2"}, "user: 1+1=</s>\nassistant: ", "2</s>"),
    "triple": (
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        "user: Add.\n\n1, 2</s>\nassistant: ",
        "3</s>",
    ),
    "triple without input": (
        {"instruction": "Say A.", "input": "", "response": "A"},
        "user: Say A.</s>\nassistant: ",
        "A</s>",
    ),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("ending", ["jsonl", "json", "jsonl.gz", "ndjson", "jl", "parquet"])
def test_every_kind_of_row_is_read_from_every_kind_of_file(kind: str, ending: str, tmp_path: Path) -> None:
    row, before, learned = ROWS[kind]
    path = tmp_path / f"chats.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist([row, row]), path)
    else:
        text = json.dumps([row, row]) if ending == "json" else f"{json.dumps(row)}\n\n{json.dumps(row)}\n"
        data = ("\ufeff" + text).encode()
        path.write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    tokenizer = make_chatting("plain")
    found = list(read_corpus(parse_corpus(str(path), "train")))
    assert len(found) == 2 and all(isinstance(one, Conversation) for one in found)
    encoded = encode_conversations(tokenizer, found)[0]  # type: ignore[arg-type]
    assert tokenizer.decode(encoded.ids).startswith(before) and learn(tokenizer, encoded) == [learned]


def test_columns_of_other_names_are_read(tmp_path: Path) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"dialogue": CHAT, "body": "x"}))
    columns = Columns((("messages", "dialogue"),))
    (found,) = read_corpus(parse_corpus(str(path), "train", columns))
    assert isinstance(found, Conversation)
    (text,) = read_corpus(parse_corpus(str(path), "train", Columns((("text", "body"),))))
    assert text == "x"


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"title": "a"}, "line 1 has title, but no `text`, no `messages`, .*: name its columns with data.columns"),
        ({"text": 3}, "line 1: column `text` holds int, not a string"),
        ({"messages": "Hi"}, "`messages` must be a list of objects with `role` and `content`, got str"),
        ({"messages": [{"role": "user"}]}, "a message that is not an object with the strings `role` and `content`"),
        ({"messages": CHAT[:2]}, "has no message of the assistant to learn"),
        ({"prompt": "a", "completion": CHAT[2:3]}, "must be two strings or two lists of messages"),
    ],
)
def test_rows_that_hold_neither_text_nor_a_conversation_are_refused(
    row: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(ValueError, match=sentence):
        list(read_corpus(parse_corpus(str(path), "train")))
    with pytest.raises(ValueError, match="data.columns has 'body', which is not a column: use text, messages"):
        Columns((("body", "x"),))


def test_without_a_template_pairs_and_triples_are_plain_text_and_messages_are_refused() -> None:
    tokenizer, columns = make_tokenizer(), Columns()
    for kind, before in (("pair", "1+1="), ("triple", "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n")):
        row, _, learned = ROWS[kind]
        conversation = columns.read(row, "row")
        assert isinstance(conversation, Conversation)
        (encoded,) = encode_conversations(tokenizer, [conversation])
        assert tokenizer.decode(encoded.ids) == before + learned and learn(tokenizer, encoded) == [learned]
    with pytest.raises(ValueError, match="'Be brief.' cannot be encoded: the tokenizer has no chat template"):
        encode_conversations(tokenizer, [converse()])


def test_a_template_that_fails_or_does_not_end_is_said_with_the_conversation() -> None:
    tokenizer = make_chatting("plain")
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="begins with 'Be brief.' cannot be encoded: roles must alternate"):
        encode_conversations(tokenizer, [converse()])
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}" + "{{ messages | length }}"
    with pytest.raises(ValueError, match="the assistant's tokens cannot be told .* or set data.loss_on to all"):
        encode_conversations(tokenizer, [converse()])


def make_encoded(*lengths: int) -> list[Encoded]:
    """Conversations of so many tokens, each of its own number, of which the first two are not learned."""
    return [Encoded([n] * length, [IGNORED, IGNORED, *[n] * (length - 2)]) for n, length in enumerate(lengths, 1)]


def test_conversations_are_packed_whole_and_none_learns_from_another() -> None:
    windows, labels = pack(make_encoded(5, 3, 8, 4, 3), 8, filler=0)
    assert windows.tolist() == [[3] * 8, [1] * 5 + [2] * 3, [4] * 4 + [5] * 3 + [0]]
    for ids, own in zip(windows, labels, strict=True):
        starts = torch.cat([torch.tensor([True]), ids[1:] != ids[:-1]])
        assert (own[starts] == IGNORED).all() and (own[ids == 0] == IGNORED).all()
    assert int((labels != IGNORED).sum()) == sum(length - 2 for length in (5, 3, 8, 4, 3))


def test_what_is_longer_than_a_window_is_cut_and_loses_no_token_but_those_that_begin_windows() -> None:
    windows, labels = pack(make_encoded(20), 8, filler=0)
    assert sorted((windows != 0).sum(1).tolist()) == [4, 8, 8]
    assert int((labels != IGNORED).sum()) == 18 - 2
    windows, labels = pack([Encoded([1] * 4, [IGNORED] * 4)], 8, filler=0)
    assert windows.shape == labels.shape == (0, 8)


def test_an_example_is_shown_with_what_is_not_learned_in_brackets() -> None:
    tokenizer = make_chatting("plain")
    (encoded,) = encode_conversations(tokenizer, [converse(CHAT[1:3])])
    assert describe_example(tokenizer, encoded) == "⟦user: Hi</s>\nassistant: ⟧Hello!</s>"
    assert find_filler(tokenizer) == tokenizer.eos_token_id


@pytest.fixture
def chat_folder(tmp_path: Path) -> Path:
    """A model whose tokenizer has a template, and conversations beside it."""
    make_model("llama").save_pretrained(tmp_path / "model")
    make_chatting("plain").save_pretrained(tmp_path / "model")
    rows = [{"messages": [CHAT[1], {"role": "assistant", "content": "Yes " * n}]} for n in range(1, 25)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def make_data(folder: Path, **settings: Any) -> TextDataModule:
    chats = str(folder / "chats.jsonl")
    sizes = {
        "calibration": {"corpora": chats, "windows": 4, "window": 32, "held_out_windows": 0},
        "training": {"corpora": f"{chats}@train", "window": 64, "batch_size": 2},
        "evaluation": {"val": f"{chats}@validation", "test": [], "window": 64},
    }
    return TextDataModule(str(folder / "model"), **{**sizes, **settings})


def test_calibration_reads_conversations_as_one_text(chat_folder: Path) -> None:
    data = make_data(chat_folder, training={"corpora": "embedded"}, evaluation={"val": [], "test": []})
    text = tokenize_corpus(data.tokenizer, data.corpora["calibration"][0])
    assert data.tokenizer.decode(text).startswith("user: Hi</s>\nassistant: Yes </s>\nuser: Hi</s>\nassistant: Yes Yes")
    assert all(batch.shape[1] == 32 for batch in data.calibration_batches())


def test_training_and_perplexity_count_the_assistants_tokens_alone(
    chat_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = make_data(chat_folder, calibration={"corpora": "embedded"})
    monkeypatch.setattr(gqaprune.common.console.console, "quiet", False)
    assert not data.learns_all
    assert "⟦text that is not learned⟧ in brackets: ⟦user: Hi" in " ".join(capsys.readouterr().out.split())
    model = gqaprune.load_model(chat_folder / "model")
    (batches,) = data.evaluation_batches(("val",)).values()
    measured = measure_perplexity(model, {"chat": batches})["chat"]
    windows, labels = read_labelled_windows(data.tokenizer, data.corpora["val"][0], 64)
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(
            model(windows).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED
        )
    assert measured == pytest.approx(float(losses.exp()), rel=1e-5)
    module = CausalLMModule(model)
    batch = next(iter(data.train_dataloader()))
    loss = module.compute_loss({**batch})
    expected = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    assert float(loss["loss"]) == pytest.approx(float(expected), rel=1e-5)  # type: ignore[index,call-overload]


@pytest.mark.parametrize("settings", [{}, {"hidden_weight": 0.5}])
def test_distillation_learns_where_there_are_labels_alone(settings: dict[str, Any], chat_folder: Path) -> None:
    data = make_data(chat_folder, calibration={"corpora": "embedded"})
    student, teacher = make_model("llama", seed=1), make_model("llama", seed=2)
    objective = Objective(RecoveryConfig("distill", distill_weight=1.0, **settings))
    objective.teacher = teacher.eval()
    batch = next(iter(data.train_dataloader()))
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    is_blank = batch["labels"].flip(1).ne(IGNORED).cumsum(1).flip(1) == 0  # behind the last label
    changed["input_ids"][is_blank] = 7
    losses = [float(objective.measure(student, one)[0]) for one in (batch, changed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    with torch.no_grad():
        logits = [model(batch["input_ids"]).logits[:, :-1].log_softmax(-1) for model in (student, teacher)]
    divergence = (logits[1].exp() * (logits[1] - logits[0])).sum(-1)[batch["labels"][:, 1:] != IGNORED].mean()
    assert float(objective.measure(student, batch)[1]["divergence"]) == pytest.approx(float(divergence), rel=1e-4)
