"""The benchmark of GGUF files in llama.cpp: its perplexity is PyTorch's, and its tables say what was measured."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("xllamacpp")
ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import llama_cpp
import llama_engine
from llama_engine import LlamaCpp, Seconds

from gqaprune.checkpoints.gguf_writer import write_gguf
from gqaprune.checkpoints.save import save
from gqaprune.evaluation.perplexity import measure_perplexity

from cuts import UNEVEN, make_pruned
from tiny import make_model, make_tokenizer, make_tokens

TOKENIZER = make_tokenizer([("e", "d"), ("r", "u")])


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose layers differ, as a GGUF file."""
    model = make_pruned("llama", UNEVEN)
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(path, model.config, model.state_dict(), TOKENIZER)
    return path


def test_perplexity_is_that_of_pytorch_on_the_same_windows(file: Path) -> None:
    windows = make_tokens(3, 24)
    expected = measure_perplexity(make_pruned("llama", UNEVEN), {"a": [{"input_ids": windows, "labels": windows}]})
    assert llama_engine.measure_perplexity(file, windows) == pytest.approx(expected["a"], rel=2e-3)


def test_tokens_read_one_by_one_give_the_logits_of_the_whole(file: Path) -> None:
    tokens, model = make_tokens(1, 12)[0].tolist(), LlamaCpp(file, 12)
    whole = model.read(tokens, needs_all=True)
    assert whole.shape == (12, 260)
    torch.testing.assert_close(model.read(tokens), whole[-1:])
    model.read(tokens[:8])
    for place in range(8, 12):
        torch.testing.assert_close(model.read(tokens[place : place + 1], place)[0], whole[place], atol=0.05, rtol=0)
    model.close()


def test_what_llama_cpp_cannot_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"llama\.cpp cannot read .*broken\.gguf"):
        LlamaCpp(tmp_path / "broken.gguf", 8)


def test_files_take_turns_after_one_that_does_not_count(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int]] = []
    plain = LlamaCpp.read

    def note(self: LlamaCpp, tokens: list[int], start: int = 0, needs_all: bool = False) -> torch.Tensor:
        read.append((id(self), len(tokens)))
        return plain(self, tokens, start, needs_all)

    monkeypatch.setattr(LlamaCpp, "read", note)
    turns = llama_engine.measure_seconds([file, file], prompt=6, generated=2, turns=2)
    assert [count for _, count in read] == [6, 1, 1] * 2 * 3
    one, other = dict.fromkeys(model for model, _ in read)
    assert [model for model, count in read if count == 6] == [one, other, other, one, one, other]
    assert len(turns) == 2 and all(seconds.prompt > 0 and seconds.decode > 0 for turn in turns for seconds in turn)


def test_ratios_are_those_of_each_turn() -> None:
    turns = [[Seconds(2, 3), Seconds(1, 1), Seconds(4, 3)], [Seconds(4, 6), Seconds(1, 6), Seconds(4, 3)]]
    assert [cell.split()[0] for cell in llama_cpp.describe_speed(turns)] == ["3.00", "0.75", "2.00", "1.50"]


def test_tables_hold_every_kind_and_model(tmp_path: Path) -> None:
    save(make_model("llama", kv_heads=3, ratio=2), TOKENIZER, tmp_path / "dense")
    save(make_pruned("llama", UNEVEN), TOKENIZER, tmp_path / "pruned")
    (tmp_path / "text.txt").write_text("the quick brown fox " * 20)
    options = ["--dense", "dense", "--pruned", "pruned"]
    options = [str(tmp_path / each) if not each.startswith("--") else each for each in options]
    options += ["--text", str(tmp_path / "text.txt"), "--tokens", "64", "--window", "32", "--prompt", "8"]
    options += ["--generated", "2", "--turns", "2", "--results", str(tmp_path / "RESULTS.md")]
    assert llama_cpp.main(options) == 0
    text = (tmp_path / "RESULTS.md").read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows if row[0] != "| ---"] == [
        "| ",
        "| PyTorch, float32",
        *(f"| {kind}" for kind in llama_cpp.KINDS),
        "| times as fast as dense",
        *(f"| {kind}" for kind in llama_cpp.KINDS),
    ]
    by_pytorch, f16 = rows[2], rows[3]
    for place in (2, 4):
        assert float(f16[place].rstrip(" |")) == pytest.approx(float(by_pytorch[place].rstrip(" |")), rel=5e-3)
    assert "2 windows of 32 tokens; a prompt of 8 tokens and 2 after it, medians of 2 turns" in text
