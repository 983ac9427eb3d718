import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import offload
import quality
import quality_figures
import quality_report
import quality_row
import quality_sources
from matplotlib.figure import Figure
from peers import PEERS, _find_ratio, read_peak_rss
from PIL import Image
from quality_sources import is_same, probe
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from gqaprune.models.loading import load, load_model

from tiny import make_tokens

TEXTS = {"calibration": "c", "a": "1", "b": "2"}


def make_spec(name: str = "criterion fisher", rate: float = 0.2) -> dict[str, Any]:
    tests = {"a": {"corpus": "a.txt", "split": "all"}, "b": {"corpus": "b.txt", "split": "all", "sample": 9}}
    return quality.make_spec(name, rate, "model", "calibration.txt", tests)


def make_key(spec: dict[str, Any], texts: dict[str, str] = TEXTS, versions: dict[str, str] | None = None) -> str:
    return quality.hash_inputs(quality.describe_inputs(spec, texts, versions or {"torch": "2"}))


def measure(perplexity: float = 20.0) -> dict[str, Any]:
    kept = {"hidden_size": 8, "query_heads": [4, 2], "kv_heads": [2, 1], "channels": [10, 6]}
    return {
        "perplexity": {"a": perplexity, "b": 10.0},
        "windows": {"a": 16, "b": 11},
        "seconds": 1.0,
        "peak_rss": 2**30,
        "rate_reached": 0.2,
        "kept": kept,
    }


def make_row(method: str, a: float, b: float, rate: float = 0.2) -> dict[str, Any]:
    inputs = {"model": "m", "tests": {"a": "1", "b": "2"}, "samples": {}, "protocol": quality.PROTOCOL}
    inputs["versions"] = {"python": "3.11.7", "torch": "2", "transformers": "5"}
    row = {"name": f"{method}@{rate:g}", "method": method, "rate": rate, "inputs": inputs, **measure()}
    return row | {"perplexity": {"a": a, "b": b}}


def test_a_row_key_changes_with_all_that_the_row_depends_on_and_with_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    key = make_key(make_spec())
    moved = make_spec() | {"peers_python": "elsewhere"}
    moved["calibration"] = moved["calibration"] | {"corpus": "/elsewhere/calibration.txt"}
    assert make_key(moved) == key
    others = [
        make_key(make_spec(rate=0.3)),
        make_key(make_spec("criterion obs")),
        make_key(make_spec("optipfair-maw")),
        make_key(make_spec() | {"model": "other"}),
        make_key(make_spec() | {"protocol": {"window": 512, "windows": 16}}),
        make_key(make_spec(), TEXTS | {"calibration": "other"}),
        make_key(make_spec(), TEXTS | {"b": "other"}),
        make_key(make_spec(), versions={"torch": "3"}),
    ]
    monkeypatch.setitem(
        quality.METHODS, "criterion fisher", quality.METHODS["criterion fisher"] | {"limits": {"min_groups": 2}}
    )
    others.append(make_key(make_spec()))
    override = {"calibration": {"windows": 128}}
    monkeypatch.setitem(quality.METHODS, "criterion fisher", {**quality.METHODS["criterion fisher"], **override})
    others.append(make_key(make_spec()))
    assert len({key, *others}) == len(others) + 1


def test_the_dense_row_does_not_depend_on_calibration() -> None:
    spec = make_spec("dense", 0.0)
    assert make_key(spec, TEXTS | {"calibration": "other"}) == make_key(spec)


def test_resume_skips_a_row_that_is_there_and_runs_it_again_when_an_input_changed(tmp_path: Path) -> None:
    runs = []

    def run(spec: dict[str, Any]) -> dict[str, Any]:
        runs.append(spec)
        return measure()

    assert quality.run_or_skip(make_spec(), TEXTS, tmp_path, True, run)
    assert not quality.run_or_skip(make_spec(), TEXTS, tmp_path, True, run)
    assert quality.run_or_skip(make_spec(), TEXTS | {"a": "changed"}, tmp_path, True, run)
    assert quality.run_or_skip(make_spec(), TEXTS | {"a": "changed"}, tmp_path, False, run)
    assert len(runs) == 3
    assert [file.name for file in tmp_path.iterdir()] == ["criterion fisher@0.2.json"]


def test_a_failing_row_is_recorded_and_run_again_on_resume(tmp_path: Path) -> None:
    assert quality.run_or_skip(make_spec(), TEXTS, tmp_path, True, lambda spec: {"error": "ValueError: no luck"})
    (row,) = quality.read_rows(tmp_path)
    assert row["error"] == "ValueError: no luck"
    assert quality.run_or_skip(make_spec(), TEXTS, tmp_path, True, lambda spec: measure())
    assert "error" not in quality.read_rows(tmp_path)[0]


def test_a_row_holds_until_its_settings_change_or_its_method_does_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quality.run_or_skip(make_spec(), TEXTS, tmp_path, True, lambda spec: measure())
    assert not quality.read_rows(tmp_path)[0]["stale"]
    monkeypatch.setattr(quality, "hash_code", lambda method: "other")  # sources that do the same
    assert not quality.read_rows(tmp_path)[0]["stale"]
    assert json.loads(next(tmp_path.iterdir()).read_text())["code"] == "other"
    monkeypatch.setattr(quality, "hash_code", lambda method: "third")
    monkeypatch.setattr(quality_sources, "probe", lambda settings, rate: probe(settings, rate) | {"kept": "others"})
    assert quality.read_rows(tmp_path)[0]["stale"]
    monkeypatch.undo()
    monkeypatch.setitem(quality.METHODS, "criterion fisher", {"criterion": "taylor"})
    assert quality.read_rows(tmp_path)[0]["stale"]


def test_what_a_method_does_depends_on_its_settings_and_its_rate_alone() -> None:
    uniform = {"criterion": "fisher", "allocation": "uniform", "repair": {"method": "none"}}
    first = probe(uniform, 0.2)
    assert is_same(first, probe(uniform, 0.2))
    assert not is_same(first, probe(uniform, 0.25)) and not is_same(first, probe(uniform | {"criterion": "obs"}, 0.2))
    assert not is_same(first, probe(uniform | {"repair": {"epochs": 0, "distill_tokens": 0}}, 0.2))
    assert 100 < probe(None, 0.0)["measured"] < 1000


def test_words_alone_make_no_row_stale() -> None:
    source = '"""A module."""\ndef f(a: int) -> int:\n    """Add."""\n    # one\n    return a + 1\n'
    assert quality_sources.strip_words(source) == quality_sources.strip_words("def f(a: int) -> int:\n    return a + 1")
    assert quality_sources.strip_words(source) != quality_sources.strip_words(source.replace("+ 1", "+ 2"))


@pytest.mark.parametrize("settings", [{"criterium": "fisher"}, {"rate": 0.1}, {"calibration": {"window_count": 3}}])
def test_an_unknown_setting_of_a_method_is_refused_by_name(settings: dict[str, Any]) -> None:
    unknown = next(iter(settings.get("calibration", settings)))
    with pytest.raises(ValueError, match=f"method 'mine': no setting '{unknown}'"):
        quality.check_methods({"mine": settings})
    quality.check_methods(quality.METHODS)


def test_a_pattern_selects_rows_and_one_that_matches_none_is_refused() -> None:
    assert quality.select_names("criterion [fo]*,dense") == ["dense", "criterion fisher", "criterion obs"]
    with pytest.raises(ValueError, match="no row 'fishy'"):
        quality.select_names("dense,fishy")


def test_the_table_ranks_by_the_mean_of_the_gaps_and_puts_failed_rows_last() -> None:
    dense = make_row("dense", 10, 10, rate=0.0)
    tuned, steady = make_row("tuned", 11, 40), make_row("steady", 15, 15)
    failed = {key: make_row("broken", 1, 1)[key] for key in ("name", "method", "rate", "inputs")}
    rows = [dense, failed | {"error": "ValueError: no"}, tuned, steady]
    assert [row["method"] for row in quality_report.rank_rows(rows, 0.2)] == ["steady", "tuned", "broken"]
    assert quality_report.compute_mean_gap(tuned, dense) == pytest.approx((math.log(1.1) + math.log(4)) / 2)
    lines = quality_report.build_lines(rows, 0.2)[1]
    assert lines[1][:5] == ["steady", "20.00%", "15.00 (0.405)", "15.00 (0.405)", "0.405"]
    assert lines[-1][1] == "failed: ValueError: no"


def test_rows_on_other_texts_than_the_dense_model_get_no_gap() -> None:
    dense, row = make_row("dense", 10, 10, rate=0.0), make_row("other", 9, 9)
    row["inputs"] = row["inputs"] | {"tests": {"a": "other", "b": "2"}}
    assert quality_report.compute_gaps(row, dense) == {}


def test_markdown_changes_only_what_is_between_the_markers(tmp_path: Path) -> None:
    rows = [make_row("dense", 10, 10, rate=0.0), make_row("mine", 12, 12)]
    file = tmp_path / "RESULTS.md"
    begin, end = (f"<!-- quality, m:{edge} -->" for edge in ("begin", "end"))
    file.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    quality_report.write_markdown(rows, file)
    text = file.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and "| mine |" in text
    quality_report.write_markdown(rows, file)
    assert file.read_text() == text
    file.write_text(f"only {begin}")
    with pytest.raises(ValueError, match="needs both markers"):
        quality_report.write_markdown(rows, file)


def capture_figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures as they are saved, which still happens."""
    figures, save = [], quality_figures.save_figure
    monkeypatch.setattr(
        quality_figures, "save_figure", lambda figure, path: (figures.append(figure), save(figure, path))
    )
    return figures


def test_figures_show_ours_beside_peers_and_no_ablations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = capture_figures(monkeypatch)
    rows = [make_row("dense", 10, 10, rate=0.0), make_row("default", 12, 12), make_row("criterion obs", 14, 14)]
    rows += [make_row("optipfair-maw", 20, 20), make_row("torch-pruning-taylor", 500, 500)]
    rows += [make_row("default", 14, 14, rate=0.3), make_row("no repair", 16, 16, rate=0.3)]
    quality_figures.draw_gaps(rows, tmp_path / "gap.png")
    quality_figures.draw_layers(rows, tmp_path / "layers.png")
    (axes,) = figures[0].axes  # none for 30 %, at which no peer was measured
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["gqaprune, default", "OptiPFair, weights", "Torch-Pruning, Taylor"]
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
    assert ends == pytest.approx([1.2, 2.0, quality_figures.LARGEST])
    assert {"1.20×", "2.00×", "→ 50×"} <= {text.get_text() for text in axes.texts}
    assert axes.get_title(loc="left") == "20% of decoder-layer parameters removed"
    for name in ("gap.png", "layers.png"):
        with Image.open(tmp_path / name) as image:
            assert image.width == 1120 and np.asarray(image.convert("L")).std() > 10


def test_rates_without_a_peer_have_no_figure(tmp_path: Path) -> None:
    rows = [make_row("dense", 10, 10, rate=0.0), make_row("default", 12, 12), make_row("no repair", 14, 14)]
    quality_figures.draw_gaps(rows, tmp_path / "gap.png")
    assert not list(tmp_path.iterdir())


def test_figures_name_at_most_eight_methods_and_all_of_them_exist() -> None:
    assert len(quality_figures.NAMES) <= 8
    assert (
        quality_figures.OURS.keys() <= quality.METHODS.keys() and quality_figures.THEIRS.keys() == quality.PEERS.keys()
    )


def test_a_row_prunes_and_measures_a_tiny_model(tiny_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    tests = {name: {"corpus": str(text), "split": "all"} for name in ("a", "b")}
    tests["b"]["sample"] = 1000
    spec = make_spec() | {"model": str(tiny_folder), "tests": tests, "protocol": {"window": 64, "windows": 3}}
    spec["calibration"] = quality.CALIBRATION | {"corpus": str(text), "windows": 4, "window": 32, "prompts": ["a"]}
    spec["settings"] = {"repair": {"method": "none"}}
    result = quality_row.run_row(spec)
    assert result["windows"] == {"a": 3, "b": 3} and set(result["perplexity"]) == {"a", "b"}
    assert result["rate_reached"] == pytest.approx(0.2, abs=0.01) and result["seconds"] > 0
    dense = quality_row.run_row(spec | {"method": "dense", "rate": 0.0})
    assert dense["rate_reached"] == 0 and dense["perplexity"] != result["perplexity"]
    json.dumps([result, dense])
    kept = spec | {"keep": str(tmp_path / "kept")}
    for _ in range(2):  # the second takes the place of the first
        quality_row.run_row(kept)
    assert load_model(tmp_path / "kept").num_parameters() == result["parameters"]
    (tmp_path / "kept" / "plan.json").unlink()
    with pytest.raises(ValueError, match="has files that are not from an earlier run"):
        quality_row.run_row(kept | {"model": "is not even loaded"})


def test_the_floor_is_fitted_on_the_tested_windows(tiny_folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    spec = make_spec(quality.FLOOR) | {"model": str(tiny_folder), "protocol": {"window": 64, "windows": 3}}
    spec["tests"] = {"a": {"corpus": str(text), "split": "all"}}
    spec["calibration"] = quality.CALIBRATION | {"corpus": "no such file", "window": 32}
    spec["settings"] |= {"limits": {"mlp_layers": [0, 3]}}
    floor = quality_row.run_row(spec)["perplexity"]["a"]
    unrepaired = quality_row.run_row(spec | {"settings": spec["settings"] | {"repair": {"method": "none"}}})[
        "perplexity"
    ]["a"]
    assert floor < unrepaired


def test_a_peer_that_fails_says_why_in_its_last_line(tmp_path: Path) -> None:
    script = tmp_path / "peer.py"
    script.write_text("raise ValueError('no such layer')")
    with pytest.raises(ValueError, match="^ValueError: no such layer$"):
        quality_row.run_peer([sys.executable, str(script)])


def test_a_peers_llama_whose_heads_do_not_divide_its_width_loads_as_a_mistral(tmp_path: Path) -> None:
    shapes = {"hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 260}
    heads = {"num_attention_heads": 10, "num_key_value_heads": 2, "head_dim": 8}
    model = AutoModelForCausalLM.from_config(MistralConfig(**shapes, **heads, sliding_window=None)).eval()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    llama = json.loads(file.read_text()) | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    file.write_text(json.dumps(llama))
    with pytest.raises(ValueError):
        load_model(tmp_path, "float32")
    loaded = quality_row.load_pruned(tmp_path).eval()
    tokens = make_tokens()
    assert torch.equal(loaded(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_the_rope_base_is_written_where_transformers_4_reads_it(tmp_path: Path) -> None:
    LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 100000.0}).save_pretrained(tmp_path)
    quality_row.point_to_rope(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["rope_theta"] == 100000.0


@pytest.mark.parametrize("rate", [0.1, 0.2, 0.3])
def test_the_ratio_for_torch_pruning_comes_within_half_a_percent_of_the_rate(rate: float) -> None:
    config = LlamaConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3
    )
    ratio = _find_ratio(config, 64, rate)
    hidden, channels = (int(size * (1 - ratio)) // 4 * 4 for size in (576, 1536))
    heads = 9 - 3 * math.ceil(math.ceil(9 * ratio) / 3)
    parameters = hidden * ((2 * heads + 6) * 64 + 3 * channels + 2)
    assert 1 - parameters / (576 * (24 * 64 + 3 * 1536 + 2)) == pytest.approx(rate, abs=0.005)


def test_peak_memory_is_that_of_this_process() -> None:
    assert 2**20 < read_peak_rss() < 2**40
    assert all(peer.distribution in (ROOT / "benchmarks/requirements.txt").read_text() for peer in PEERS.values())


def test_the_synthetic_model_is_one_that_loads_with_its_tokenizer(tmp_path: Path) -> None:
    size = offload.write_model(tmp_path, layers=1)
    model, tokenizer = load(tmp_path)
    assert size == sum(parameter.nbytes for parameter in model.parameters())
    assert tokenizer.decode(tokenizer("A word.")["input_ids"]) == "A word."
