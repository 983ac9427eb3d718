"""`gqaprune compare`: every number is what the functions alone give, on the same text, one model at a time."""

import gc
import io
import json
import math
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from transformers import PreTrainedModel

import gqaprune
from gqaprune.cli import main
from gqaprune.commands import measure
from gqaprune.commands.compare import compare
from gqaprune.commands.comparison import Comparison, Speed, Subject, build_comparison_table, draw_comparison
from gqaprune.commands.speed import Run
from gqaprune.commands.tasks import Score
from gqaprune.data.corpora import parse_corpus
from gqaprune.data.windows import cut_windows, make_batches, tokenize_corpus
from gqaprune.evaluation.perplexity import measure_perplexity
from gqaprune.geometry import Geometry
from gqaprune.models.loading import load_model
from gqaprune.models.tokenizer import load_tokenizer
from gqaprune.reporting.charts import encode_figure
from gqaprune.reporting.report import Stage, describe_model

from cuts import UNEVEN, make_plan, make_pruned
from tiny import make_model, make_tokenizer

SMALL: dict[str, Any] = {"eval_window": 32, "eval_tokens": 500, "prompt": 16, "generated": 2}
CORPUS = "embedded@test"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A dense model, it pruned unevenly, and two with tokenizers of their own, one of them as GGUF."""
    root = tmp_path_factory.mktemp("models")
    gqaprune.save(make_model(kv_heads=3, ratio=2), make_tokenizer(), root / "dense")
    plan = make_plan(make_model(kv_heads=3, ratio=2), *UNEVEN)
    gqaprune.save(make_pruned("llama", UNEVEN), make_tokenizer(), root / "pruned", plan)
    model = make_model(kv_heads=3, ratio=2)
    tokenizer = make_tokenizer([("e", "d")])
    tokenizer.add_special_tokens({"pad_token": "<|endoftext|>"})  # else the reader of GGUF files adds it
    gqaprune.save(model, tokenizer, root / "gguf", format="gguf-f16")
    gqaprune.save(make_model("qwen2", layers=2), make_tokenizer([("t", "h")]), root / "other")
    return {name: str(root / name) for name in ("dense", "pruned", "gguf", "other")}


def read(capsys: pytest.CaptureFixture[str], models: list[str], **settings: Any) -> Any:
    capsys.readouterr()
    compare(models, json=True, **{**SMALL, **settings})
    return json.loads(capsys.readouterr().out)  # nothing but one object


def test_numbers_are_those_of_the_functions_alone(folders: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    found = read(capsys, [folders["dense"], folders["pruned"]], speed=False, eval_stride=16)
    for name, row in zip(("dense", "pruned"), found["models"], strict=True):
        model, tokenizer = gqaprune.load(folders[name])
        ids = tokenize_corpus(tokenizer, parse_corpus(CORPUS, "test"), 500)
        perplexity = measure_perplexity(model, {CORPUS: make_batches(*cut_windows(ids, 32, 16), 1)})
        stage = describe_model(name, model, perplexity)
        assert (row["model"], row["name"], row["family"], row["dtype"]) == (folders[name], name, "llama", "float32")
        assert row["parameters"] == stage.parameters and row["decoder_parameters"] == stage.decoder_parameters
        assert row["kv_cache_bytes_per_token"] == stage.kv_cache_bytes_per_token
        assert row["perplexity"] == perplexity and row["tokens"] == {CORPUS: 500}
        # A byte tokenizer: the bits of a byte are those of a token.
        assert row["bits_per_byte"][CORPUS] == pytest.approx(math.log2(perplexity[CORPUS]))
        assert row["disk_bytes"] == Path(folders[name], "model.safetensors").stat().st_size
        assert row["speed"] is None and row["tasks"] == {} and not row["has_other_tokenizer"]
    heads = [
        [layer[kind] for layer in found["models"][1]["layers"]] for kind in ("query_heads", "kv_heads", "channels")
    ]
    assert heads == [
        [2 * len(groups) for groups in UNEVEN[0]],
        [len(g) for g in UNEVEN[0]],
        [len(c) for c in UNEVEN[1]],
    ]
    assert found["text_bytes"] == {CORPUS: 500}
    assert found["protocol"] == [
        "perplexity: token-weighted, windows with stride 16 of 32 tokens, first 500 tokens, counted with the first "
        "model's tokenizer"
    ]


def test_other_tokenizers_read_the_same_text_and_are_warned_of(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    compare([folders["dense"], folders["other"], folders["gguf"]], json=True, speed=False, **SMALL)
    output = capsys.readouterr()
    found = json.loads(output.out)
    assert (
        f"the tokenizer of {folders['dense']} differs from that of {folders['other']}, {folders['gguf']}: "
        in output.err
    )
    assert found["has_several_tokenizers"]
    assert [row["has_other_tokenizer"] for row in found["models"]] == [False, True, True]
    text = load_tokenizer(folders["dense"]).decode(
        tokenize_corpus(load_tokenizer(folders["dense"]), parse_corpus(CORPUS, "test"), 500)
    )
    own = load_tokenizer(folders["other"])(text)["input_ids"]
    row = found["models"][1]
    assert row["tokens"] == {CORPUS: len(own)} and len(own) < 500
    perplexity = measure_perplexity(
        load_model(folders["other"]), {"own": make_batches(*cut_windows(torch.tensor(own), 32), 1)}
    )["own"]
    assert row["perplexity"][CORPUS] == perplexity
    assert row["bits_per_byte"][CORPUS] == pytest.approx(math.log2(perplexity) * len(own) / 500)


def test_where_a_limit_cuts_a_token_the_first_models_tokens_stay_its_own(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    # Characters of two bytes, a token each: an odd limit ends within one, and its half decodes to something else.
    text = tmp_path / "text.txt"
    text.write_text("ä" * 200, encoding="utf-8")
    found = read(capsys, [folders["dense"], folders["dense"]], corpora=[str(text)], eval_tokens=99, speed=False)
    first, second = found["models"]
    assert first["tokens"] == second["tokens"] == {f"{text}@all": 99} and not second["has_other_tokenizer"]
    assert first["perplexity"] == second["perplexity"]
    assert (first["name"], second["name"]) == ("dense (1)", "dense (2)")


def test_speed_is_the_median_after_a_warm_up_and_peak_is_beyond_the_process_without_the_model(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [Run(8.0, 8.0, 1), Run(1.0, 0.5, 1), Run(4.0, 4.0, 1), Run(2.0, 1.0, 1)] * 2
    seen: list[tuple[int, ...]] = []
    starts = iter([700, 400, 700, 900])  # before the turns, and when the model is gone; for both models

    def run(model: PreTrainedModel, prompt_BT: torch.Tensor, generated: int) -> Run:
        seen.append((*prompt_BT.shape, generated))
        return runs.pop(0)

    monkeypatch.setattr(measure, "run", run)
    monkeypatch.setattr(measure, "has_peak", lambda device: True)
    monkeypatch.setattr(measure, "start_peak", lambda device: next(starts))
    monkeypatch.setattr(measure, "read_peak", lambda device: 800)
    found = read(capsys, [folders["dense"], folders["pruned"]], corpora=[], prompt=16, generated=2)
    assert [row["speed"] for row in found["models"]] == [
        {"prefill": 8.0, "decode": 2.0, "peak_bytes": peak, "prefill_range": [4.0, 16.0], "decode_range": [0.5, 4.0]}
        for peak in (400, 0)
    ]
    assert seen == [(1, 16, 2)] * 8
    assert found["protocol"][0].startswith("speed and peak memory: 16 tokens read, 2 generated, median of 3 turns")


def test_measured_speed_is_positive_and_no_text_is_needed(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = read(capsys, [folders["dense"], folders["gguf"]], corpora=[])
    for row in found["models"]:
        assert row["speed"]["prefill"] > 0 and row["speed"]["decode"] > 0 and row["perplexity"] == {}
    assert found["models"][1]["disk_bytes"] == Path(folders["gguf"], "model-f16.gguf").stat().st_size


def test_one_model_is_in_memory_at_a_time(
    folders: dict[str, str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    living: list[weakref.ref[PreTrainedModel]] = []

    def load(*arguments: Any, **settings: Any) -> PreTrainedModel:
        gc.collect()
        assert [model for model in living if model() is not None] == []
        model = load_model(*arguments, **settings)
        living.append(weakref.ref(model))
        return model

    monkeypatch.setattr(measure, "load_model", load)
    read(capsys, [folders["dense"], folders["pruned"], folders["gguf"]])
    assert len(living) == 3


def make_subject(name: str, channels: tuple[int, ...] = (10, 10, 10), **changes: Any) -> Subject:
    kv_heads = tuple(2 if width == 10 else 1 for width in channels)
    geometry = Geometry("llama", 8, 4, tuple(3 * heads for heads in kv_heads), kv_heads, channels)
    stage = Stage(name, 2_000_000, 1_000_000, 4096, {CORPUS: 10.0}, 8_000_000)
    changes = {"stage": stage, "bits_per_byte": {CORPUS: 1.5}, "speed": Speed(100.0, 10.0, 9_000_000)} | changes
    return Subject(name, "float32", geometry, **changes)


def make_comparison(**changes: Any) -> Comparison:
    smaller = Stage("small", 1_500_000, 500_000, 2048, {CORPUS: 12.0}, 6_000_000)
    settings = {
        "stage": smaller,
        "bits_per_byte": {CORPUS: 1.8},
        "speed": Speed(150.0, 12.5, None),
        "scores": {"colours acc": Score(0.5, 0.125)},
    }
    first = make_subject("big", scores={"colours acc": Score(0.75, 0.25)})
    second = make_subject("small", (10, 6, 4), **(settings | changes))
    return Comparison((first, second), {CORPUS: 500}, ("perplexity: as we do it", "tasks: some"))


def render(comparison: Comparison) -> tuple[dict[str, list[str]], str]:
    """Cells by row, and the text below."""
    console = Console(record=True, width=120, file=io.StringIO())
    console.print(build_comparison_table(comparison))
    text = console.export_text()
    rows = [[cell.strip() for cell in line.strip("│┃ ").split("│")] for line in text.splitlines()]
    return {cells[0]: cells[1:] for cells in rows if len(cells) > 1}, " ".join(text.split("┘")[1].split())


def test_the_table_shows_changes_from_the_first_model() -> None:
    rows, below = render(make_comparison())
    assert rows == {
        "parameters": ["2.00 M", "1.50 M (-25.0%)"],
        "decoder parameters": ["1.00 M", "0.50 M (-50.0%)"],
        "type in memory": ["float32", "float32"],
        "size on disk": ["8.0 MB", "6.0 MB (-25.0%)"],
        "KV-cache bytes/token": ["4,096", "2,048 (-50.0%)"],
        "ppl embedded@test": ["10.00", "12.00 (+20.0%)"],
        "bits/byte embedded@test": ["1.5000", "1.8000 (+20.0%)"],
        "prefill tokens/s": ["100.0", "150.0 (+50.0%)"],
        "decode tokens/s": ["10.0", "12.5 (+25.0%)"],
        "peak memory": ["9.0 MB", "–"],
        "colours acc": ["0.7500 ± 0.2500", "0.5000 ± 0.1250 (-0.2500)"],
        "layers": ["3", "3"],
        "query heads : KV heads": ["6 : 2", "3 – 6 : 1 – 2"],
        "MLP channels": ["10", "4 – 10"],
        "layers that differ": ["", "2"],
    }
    assert below == "perplexity: as we do it tasks: some"


def test_the_table_says_which_perplexities_are_not_comparable() -> None:
    rows, below = render(make_comparison(has_other_tokenizer=True))
    assert rows["ppl embedded@test"] == ["10.00", "12.00 *"]
    assert rows["bits/byte embedded@test"][1] == "1.8000 (+20.0%)"
    assert "* its tokenizer differs from the first model's: bits per byte are comparable" in below


def test_speeds_whose_turns_overlap_are_no_difference() -> None:
    first = Speed(100.0, 10.0, None, (95.0, 106.0), (9.9, 10.1))
    comparison = make_comparison(speed=Speed(104.0, 12.0, None, (103.0, 108.0), (11.0, 13.0)))
    comparison = replace(comparison, subjects=(replace(comparison.subjects[0], speed=first), comparison.subjects[1]))
    rows, below = render(comparison)
    assert rows["prefill tokens/s"] == ["100.0", "104.0 ~"] and rows["decode tokens/s"] == ["10.0", "12.0 (+20.0%)"]
    assert "~ no clear difference from the first model: the ranges of both over their turns overlap" in below


def test_layers_that_only_one_model_has_differ() -> None:
    assert make_subject("long", (10, 6, 10, 10, 10)).count_differing_layers(make_subject("short")) == 3
    assert make_subject("short").count_differing_layers(make_subject("long", (10, 6, 10, 10, 10))) == 3


def find_shares(figure: Any) -> dict[str, list[list[float]]]:
    return {
        axes.get_title(loc="left"): [list(line.get_ydata()) for line in axes.lines]
        for axes in figure.axes
        if axes.lines
    }


def test_the_figure_shows_kept_shares_and_bars() -> None:
    figure = draw_comparison(make_comparison())
    shares = {"KV heads: 4 of 6": [[1, 1, 1], [1, 0.5, 0.5]], "MLP channels: 20 of 30": [[1, 1, 1], [1, 0.6, 0.4]]}
    assert find_shares(figure) == shares
    bars = {axes.get_title(loc="left"): [bar.get_width() for bar in axes.patches] for axes in figure.axes}
    assert bars["perplexity on embedded@test, lower is better"] == [10.0, 12.0]
    assert bars["size on disk, MB"] == [8.0, 6.0]
    assert [label.get_text() for label in figure.axes[-1].get_yticklabels()] == ["big", "small"]
    assert encode_figure(figure).startswith(b"\x89PNG") and figure.get_figwidth() == 7.0


def test_the_figure_shows_bits_per_byte_where_tokenizers_differ_and_nothing_without_text() -> None:
    bars = {axes.get_title(loc="left") for axes in draw_comparison(make_comparison(has_other_tokenizer=True)).axes}
    assert "bits per byte on embedded@test (tokenizers differ), lower is better" in bars
    assert not any("perplexity" in title for title in bars)
    subjects = make_comparison().subjects
    assert len(draw_comparison(Comparison(subjects, {}, ())).axes) == 3


def test_the_figure_has_no_panel_for_shapes_that_no_model_changed() -> None:
    big, small = make_comparison().subjects
    assert len(draw_comparison(Comparison((big, big), {}, ())).axes) == 1
    heads = replace(small, geometry=replace(small.geometry, channels=big.geometry.channels))
    assert list(find_shares(draw_comparison(Comparison((big, heads), {}, ())))) == ["KV heads: 4 of 6"]
    assert list(find_shares(draw_comparison(Comparison((heads, big), {}, ())))) == ["KV heads: 6 beside 4"]


def test_query_heads_have_a_panel_where_ratios_differ() -> None:
    geometry = Geometry("llama", 8, 4, (4, 6, 6), (2, 2, 2), (10, 10, 10))
    other = Subject("queries", "float32", geometry, make_subject("queries").stage)
    shares = find_shares(draw_comparison(Comparison((make_subject("big"), other), {}, ())))
    assert list(shares) == ["Query heads: 16 of 18"]  # KV heads and channels are the same
    assert shares["Query heads: 16 of 18"][1] == pytest.approx([2 / 3, 1, 1])


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["gqaprune", "compare", *arguments])
    return main()


def test_the_command_prints_a_table_and_draws_a_picture(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ["--eval_window", "32", "--eval_tokens", "100", "--speed", "false", "--png", str(tmp_path / "a.png")]
    assert run_main(monkeypatch, folders["dense"], folders["pruned"], *settings, "--corpora", "[embedded@train]") == 0
    printed = capsys.readouterr().out
    assert "ppl embedded@train" in printed and "tokens/s" not in printed and "layers that differ" in printed
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "PNG" and min(image.size) > 500
        assert np.asarray(image.convert("L")).std() > 10


ERRORS: dict[str, tuple[list[str], str]] = {
    "one model": (["{dense}"], "compare needs two models or more, got 1"),
    "no folder": (["{dense}", "/no/where"], "no model at /no/where"),
    "no weights": (
        ["{dense}", "{empty}"],
        "cannot load a model from '{empty}': it has no weights: there is neither model.safetensors nor",
    ),
    "no config": (["{dense}", "{root}"], "{root} is not a Hugging Face checkpoint"),
    "unknown family": (["{dense}", "{gpt2}"], "model {gpt2}: models of type 'gpt2' cannot be pruned yet"),
    "tokenizer of another": (
        ["{dense}", "{wide}"],
        "model {wide}: the tokenizer has id 269 for '</s>' but the model embeds ids below 260",
    ),
    "short text": (
        ["{dense}", "{dense}", "--eval_tokens", "9"],
        "corpus embedded@test, tokens of {dense}: 9 tokens do",
    ),
    "no corpus": (["{dense}", "{dense}", "--corpora", "[nothing]"], "no corpus or file 'nothing'"),
    "no tokens": (["{dense}", "{dense}", "--generated", "0"], "generated must be at least 1, got 0"),
    "no limit": (["{dense}", "{dense}", "--tasks_limit", "0"], "tasks_limit must be at least 1, got 0"),
    "dtype": (["{dense}", "{dense}", "--dtype", "int3"], "dtype must be one of float32,"),
    "no place": (["{dense}", "{dense}", "--png", "/no/where/a.png"], "cannot write a figure to /no/where/a.png"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_come_in_a_sentence_before_anything_is_measured(
    case: str,
    folders: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    places = {"dense": folders["dense"], "root": str(tmp_path)}
    for name in ("empty", "gpt2", "wide"):
        places[name] = str(tmp_path / name)
        model = make_model()
        if name == "wide":
            model.save_pretrained(tmp_path / name)
        else:
            model.config.save_pretrained(tmp_path / name)
        make_tokenizer([(letter, letter) for letter in "abcdefghijkl"] if name == "wide" else []).save_pretrained(
            tmp_path / name
        )
    (tmp_path / "gpt2/config.json").write_text('{"model_type": "gpt2"}')
    monkeypatch.setattr(measure, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    arguments, sentence = ERRORS[case]
    assert run_main(monkeypatch, *(argument.format(**places) for argument in arguments)) == 1
    error = capsys.readouterr().err.split("gqaprune: error: ")[1]
    assert sentence.format(**places) in error


def test_weights_that_do_not_load_are_named(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    gqaprune.save(model, make_tokenizer(), tmp_path / "nan")
    with pytest.raises(ValueError, match=rf"model {tmp_path}/nan: the loss on embedded@test, batch 0 is not finite"):
        compare([folders["dense"], str(tmp_path / "nan")], **SMALL)


def test_windows_longer_than_a_models_context_are_refused_before_one_is_measured(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="eval_window is 257 tokens, the model's context 256: set it to 256 or less"):
        compare([folders["dense"], folders["pruned"]], **{**SMALL, "eval_window": 257})


def test_each_model_is_measured_on_windows_that_begin_as_its_family_says(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gqaprune.save(make_model("gemma2"), make_tokenizer(), tmp_path / "gemma")
    found = read(capsys, [folders["dense"], str(tmp_path / "gemma")], speed=False)
    for folder, row in zip((folders["dense"], tmp_path / "gemma"), found["models"], strict=True):
        model, tokenizer = gqaprune.load(folder)
        ids = tokenize_corpus(tokenizer, parse_corpus(CORPUS, "test"), 500)
        bos = 256 if row["family"] == "gemma2" else None
        assert row["perplexity"] == measure_perplexity(model, {CORPUS: make_batches(*cut_windows(ids, 32, bos=bos))})
    assert "dense: none beginning with BOS, gemma: each beginning with BOS" in found["protocol"][0]
    plain = read(capsys, [folders["dense"], str(tmp_path / "gemma")], speed=False, bos=False)
    assert "BOS" not in plain["protocol"][0]
    assert plain["models"][0]["perplexity"] == found["models"][0]["perplexity"]
    assert plain["models"][1]["perplexity"] != found["models"][1]["perplexity"]


def test_bos_that_a_tokenizer_has_not_is_refused_by_the_models_name(folders: dict[str, str], tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = None
    gqaprune.save(make_model(), tokenizer, tmp_path / "bare")
    with pytest.raises(ValueError, match="bare: bos is true, but the tokenizer has no beginning-of-text token"):
        compare([folders["dense"], str(tmp_path / "bare")], bos=True, **SMALL)
