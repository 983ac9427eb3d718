"""The model card: front matter that the hub reads, what was cut, how to load it, what was measured."""

import ast
import os
import re
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml
from huggingface_hub import ModelCard

from gqaprune.checkpoints.base import say_nothing
from gqaprune.checkpoints.card import CARD_FILE, describe_padding, write_card
from gqaprune.checkpoints.formats import FORMATS
from gqaprune.common.safe_text import for_markdown
from gqaprune.reporting.report import Report, Stage

from cuts import make_plan
from tiny import make_model

MODEL = make_model("qwen2", kv_heads=3, ratio=2)
PLAN = replace(
    make_plan(MODEL, [[0, 2], [0, 1, 2], [0, 1, 2]], [list(range(10)), list(range(20)), list(range(20))]),
    model="Qwen/Qwen2.5-7B",
    criterion="fisher+obs",
    allocation="global",
    rate=0.25,
)
STAGES = [Stage(name, 10, 8, 4, {"val/a": value}) for name, value in (("dense", 9.5), ("pruned", 11.25))]
NOTHING: dict[str, object] = {"report": None, "command": [], "written": PLAN.pruned_geometry}
REPORT = Report("m", {}, "windows of 32 tokens, token-weighted", STAGES)


def read_card(folder: Path, **arguments: object) -> tuple[dict[str, object], str]:
    settings = {"plan": PLAN, "format": "per-layer", "written": PLAN.pruned_geometry, **arguments}
    write_card(folder, **settings)  # type: ignore[arg-type]
    _, front, body = (folder / CARD_FILE).read_text().split("---\n", 2)
    return yaml.safe_load(front), body


def test_card_says_what_was_cut_measured_and_how_to_load_it(tmp_path: Path) -> None:
    front, body = read_card(tmp_path, report=REPORT, command=["gqaprune", "fit", "--data.prompts", "[Once upon]"])
    assert front == {
        "base_model": "Qwen/Qwen2.5-7B",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["gqaprune", "pruned"],
    }
    assert "# Qwen2.5-7B, pruned" in body and "to remove 25.0% of its decoder-layer parameters" in body
    assert "| 0 | 4 of 6 | 2 of 3 | 10 of 20 |\n| 1-2 | 6 | 3 | 20 |" in body
    assert "| val/a | 9.50 | 11.25 |\n\nwindows of 32 tokens, token-weighted." in body
    assert f'from_pretrained("{tmp_path.name}", trust_remote_code=True)' in body
    assert "gqaprune fit --data.prompts '[Once upon]'" in body


def test_card_of_a_local_model_names_no_base_on_the_hub(tmp_path: Path) -> None:
    front, body = read_card(tmp_path, plan=replace(PLAN, model="/home/me/models/mine"))
    assert "base_model" not in front and "# mine, pruned" in body and "/home/me" not in body
    assert "Perplexity" not in body and "How it was made" not in body


def test_card_of_a_folder_here_names_no_base_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/mine").mkdir(parents=True)
    for model in ("./mine", "models/mine", "~/mine"):
        assert "base_model" not in read_card(tmp_path, plan=replace(PLAN, model=model))[0]


@pytest.mark.parametrize(
    "model",
    ["o/a: b # c", "o/'\"", "true/false", "o/日本", "o/" + "long " * 90, "o/a\n---\nb: c", "o/\x00\x1b\udcff\u2028"],
)
def test_front_matter_holds_any_name_as_it_is(model: str, tmp_path: Path) -> None:
    write_card(tmp_path, replace(PLAN, model=model), "stock", PLAN.geometry)
    assert ModelCard.load(tmp_path / CARD_FILE).data.base_model == model


HOSTILE = "a`b\n```\n# x\"); import os #'$(id)\x1b[2J\u202e |<b>[c](http://d)\udcff"

FORMATS_ALONE = [name for name, entry in FORMATS.items() if entry.describe is say_nothing]
"""Formats whose card needs no file of theirs."""


def test_card_is_markdown_in_which_every_name_is_text(tmp_path: Path) -> None:
    plan = replace(PLAN, model=f"/m/{HOSTILE}", criterion=HOSTILE, allocation=HOSTILE)
    stages = [replace(stage, name=HOSTILE, perplexity={HOSTILE: 2.0}) for stage in STAGES]
    report = replace(REPORT, protocol=f"{HOSTILE} {{{{ 7 * 7 }}}} {{% raw %}}", stages=stages)
    plain = read_card(tmp_path, report=REPORT, command=["a"], name="a")[1]
    for format in FORMATS_ALONE:
        text = read_card(tmp_path, plan=plan, format=format, report=report, command=[HOSTILE, "-x"], name=HOSTILE)[1]
        assert text.replace("\n", "").isprintable()
        title = for_markdown(HOSTILE.rpartition("/")[2])
        assert _find_structure(text) == [line.replace("Qwen2.5-7B", title) for line in _find_structure(plain)]
        assert f"\n{for_markdown(report.protocol)}.\n" in text
        assert f"| {for_markdown(HOSTILE)} | 2.00 | 2.00 |" in text


def _find_structure(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(("#", "| ---"))]


def test_code_of_the_card_names_the_folder_whatever_its_name(tmp_path: Path) -> None:
    for format in FORMATS_ALONE:
        _, body = read_card(tmp_path, format=format, name=HOSTILE, command=["gqaprune", HOSTILE])
        blocks = re.findall("^```(\\w+)\\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
        assert blocks
        for language, block in blocks:
            if language == "python":
                calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
                assert [call.args[0].value for call in calls] == [HOSTILE]  # type: ignore[attr-defined]
            for line in block.splitlines() if language == "bash" else ():
                words = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], check=True, capture_output=True).stdout
                assert os.fsencode(HOSTILE) in words


def test_a_folder_that_looks_like_an_option_is_none(tmp_path: Path) -> None:
    assert "vllm serve ./-rf" in read_card(tmp_path, format="padded", name="-rf")[1]


def test_parts_without_anything_to_tell_leave_no_empty_lines(tmp_path: Path) -> None:
    whole = {"report": REPORT, "command": ["a"], "written": PLAN.geometry}
    for left_out in ({}, *({name: value} for name, value in NOTHING.items()), NOTHING):
        text = read_card(tmp_path, **whole | left_out)[1]
        assert "\n\n\n" not in text and text.startswith("\n# ") and re.search(r"[^\n]\n\Z", text)
    assert text.endswith("| 1-2 | 6 | 3 | 20 |\n")


def test_card_is_read_and_written_by_the_hub_without_a_change(tmp_path: Path) -> None:
    read_card(tmp_path, report=REPORT, command=["a"])
    text = (tmp_path / CARD_FILE).read_text()
    assert f"{ModelCard.load(tmp_path / CARD_FILE)}" == text


def test_card_is_written_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert read_card(tmp_path, report=REPORT)[0]["library_name"] == "transformers"


def test_card_names_the_folder_that_its_own_is_going_to_be(tmp_path: Path) -> None:
    assert 'from_pretrained("pruned", trust' in read_card(tmp_path, name="pruned")[1]


def test_card_says_how_vllm_serves_it(tmp_path: Path) -> None:
    own = replace(PLAN.pruned_geometry, family="llama")
    wide = replace(PLAN.geometry, query_heads=(3,) * 3, kv_heads=(1,) * 3)  # 3 heads of 8 on a width of 24
    for format, written, name, command in (
        ("per-layer", PLAN.pruned_geometry, "pruned", "vllm serve pruned --trust-remote-code"),
        ("padded", wide, "two words", "vllm serve 'two words'"),
        ("padded", PLAN.geometry, "pruned", "vllm serve pruned --model-impl transformers"),
        ("stock", own, "pruned", "vllm serve pruned"),
        ("gguf-f16", wide, "pruned", ""),
    ):
        body = read_card(tmp_path, format=format, written=written, name=name)[1]
        assert re.findall("^vllm.*$", body, re.MULTILINE) == ([command] if command else [])
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "torchao"}}')
    assert "vllm serve" not in read_card(tmp_path)[1]  # which reads no weights in 8 bits by torchao


@pytest.mark.parametrize(("format", "file"), [("padded", ""), ("gguf-q8_0-padded", "model-q8_0.gguf")])
def test_card_says_how_much_padding_gave_back(format: str, file: str, tmp_path: Path) -> None:
    if file:
        (tmp_path / file).touch()
    _, body = read_card(tmp_path, format=format, written=PLAN.geometry)
    assert "channels: 0.00 M parameters, 100% of the parameters that pruning removed." in body
    assert "trust_remote_code" not in body and (f'gguf_file="{file}"' in body) == bool(file)


def test_card_of_a_gguf_file_says_how_llama_cpp_and_gqaprune_load_it(tmp_path: Path) -> None:
    (tmp_path / "model-f16.gguf").touch()
    _, body = read_card(tmp_path, format="gguf-f16", name="pruned")
    for command in ("llama-cli", "llama-server"):
        assert f"\n{command} -m pruned/model-f16.gguf\n" in body
    assert 'model, tokenizer = gqaprune.load("pruned")' in body and "from_pretrained" not in body


def test_card_says_where_widths_are_rounded(tmp_path: Path) -> None:
    rounded = replace(PLAN.pruned_geometry, channels=(32, 64, *PLAN.pruned_geometry.channels[2:]))
    _, body = read_card(tmp_path, format="gguf-q8_0", written=rounded)
    assert "layers are padded with zeros to sizes that the format allows: 0.0" in body


def test_card_of_layers_padded_each_to_its_own_size_names_no_size(tmp_path: Path) -> None:
    written = replace(PLAN.pruned_geometry, channels=(11, 20, 20))
    _, body = read_card(tmp_path, format="nemotron-nas", written=written)
    assert "layers are padded with zeros to sizes that the format allows: 0.00 M parameters, 4% of the" in body
    assert f"vllm serve {tmp_path.name} --trust-remote-code" in body and f'gqaprune.load("{tmp_path.name}")\n' in body


def test_card_counts_in_what_the_rate_is_a_share_of(tmp_path: Path) -> None:
    _, body = read_card(tmp_path, plan=replace(PLAN, rate_base="all", kv_rate=0.5))
    assert "to remove 25.0% of its parameters and 50.0% of its KV heads, with" in body


def test_padding_counts_the_zeros_of_every_projection() -> None:
    dense, pruned = PLAN.geometry, PLAN.pruned_geometry
    zeros = 2 * 24 * 8 * (2 + 1) + 3 * 24 * 10  # 2 query heads, 1 KV head and 10 channels of a layer 24 wide
    assert dense.projection_weights - pruned.projection_weights == zeros
    assert describe_padding(pruned, pruned) == ""
