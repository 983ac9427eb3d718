"""The benchmarks of speed and memory: what they measure on tiny models, and what their tables say."""

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import contention
import gpu
import growth
import inference
import inference_report
import measuring
import speed
import wide

import gqaprune
from gqaprune.commands.speed import Run, read_clock, read_peak, run, start_peak

CASE = inference_report.Case("tiny", "float32", "cpu", 32, 4)
VARIANTS = {
    "rounded": {"rate": 0.2, "limits": {"channel_multiple": 8}},
    "own widths": {"rate": 0.2, "limits": {"channel_multiple": 8}, "allocation": "global"},
    "groups": {"rate": 0.0, "kv_rate": 0.5},
}


@pytest.fixture
def results(monkeypatch: pytest.MonkeyPatch) -> list[inference_report.Result]:
    peaks = iter((1000, 900, 800, 700))
    monkeypatch.setattr(inference, "measure_peak_apart", lambda case, settings: next(peaks))
    return inference.measure(CASE, VARIANTS, turns=2)


def test_the_caches_tensors_are_as_large_as_the_plans_shapes_say(results: list[inference_report.Result]) -> None:
    dense = 2 * 8 * 2 * 16 * 4 * (32 + 4)  # keys and values, layers, KV heads, features, bytes, tokens
    assert {run.cache_bytes for result in results for run in result.dense} == {dense}
    for result, expected in zip(results, (dense, dense, dense // 2), strict=True):
        assert {run.cache_bytes for run in result.pruned} == {expected}
        assert result.cache == expected


def test_variants_are_cut_in_all_layers_and_stand_beside_the_dense_model(
    results: list[inference_report.Result],
) -> None:
    rounded, own, groups = results
    assert rounded.widths == (112, 112) and rounded.removed == pytest.approx(0.214, abs=0.001)
    assert own.widths[0] < own.widths[1] and own.widths[0] % 8 == own.widths[1] % 8 == 0
    assert groups.widths == (160, 160) and groups.removed > 0.1
    assert [result.peaks for result in results] == [(1000, 900), (1000, 800), (1000, 700)]
    for result in results:
        assert len(result.dense) == len(result.pruned) == 2
        assert all(run.prefill > 0 and run.decode > 0 for run in [*result.dense, *result.pruned])
        assert all(1 < ideal < 1.5 for ideal in result.ideal.values()) and result.weights[1] < result.weights[0]


@pytest.mark.parametrize("is_tied", [False, True])
def test_ideal_work_is_that_of_the_weights_a_token_meets(is_tied: bool) -> None:
    config = measuring.GEOMETRIES["tiny"].__class__(**measuring.GEOMETRIES["tiny"].to_dict())
    config.tie_word_embeddings = is_tied
    model = measuring.make_model(config, torch.float32, "cpu")
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    weights = sum(linear.weight.numel() for linear in linears)
    head = model.lm_head.weight.numel()
    norms = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim == 1)
    cache_bytes = 2 * 8 * 2 * 16 * 4 * (32 + 2)
    work = inference.count_work(model, CASE)
    assert work == {"prefill": (weights - head) * 32 + head, "decode": 4 * (weights + norms) + cache_bytes}


def test_a_run_writes_what_generate_writes() -> None:
    model = inference.load(CASE)
    inference.cut(model, VARIANTS["own widths"])
    prompt_BT, seen = measuring.make_tokens(model.config, 1, 32), []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    run(model, prompt_BT, 4)
    written = torch.cat(seen, dim=1)
    model.generation_config.eos_token_id = None
    assert torch.equal(written, model.generate(prompt_BT, max_new_tokens=4, do_sample=False))


def test_every_variant_is_a_valid_config() -> None:
    for settings in inference.VARIANTS.values():
        assert gqaprune.PruningConfig(**settings).removes_something


def make_result(**changes: Any) -> inference_report.Result:
    return inference_report.Result(
        **{
            "name": "mine",
            "dense": [Run(1.0, 2.0, 4096), Run(2.0, 2.0, 4096), Run(4.0, 2.0, 4096)],
            "pruned": [Run(0.5, 2.0, 2048), Run(1.6, 2.0, 2048), Run(3.2, 1.0, 2048)],
            "ideal": {"prefill": 1.25, "decode": 2.0},
            "peaks": (4 * 2**20, 3 * 2**20),
            "weights": (2 * 2**20, 2**20),
            "cache": 2048,
            "widths": (8, 16),
            "removed": 0.2,
        }
        | changes
    )


def test_tables_give_speed_up_ideal_and_the_share_of_it() -> None:
    text = inference_report.describe([make_result()], CASE)
    assert (
        "| mine | 20.0% | 8 to 16 | 16.0 (8.0 to 32.0) | 20.0 (10.0 to 64.0) | 1.25 (1.25 to 2.00) | 1.25 | 1.00 |"
        in text
    )
    assert "| 1.00 (1.00 to 2.00) | 2.00 | 0.50 |" in text
    assert "| mine | 1 MiB (0.50) | 3 MiB (0.75) | 2,048 | 2,048 | 0.50 |" in text
    assert "weights 2 MiB, peak 4 MiB, KV cache 4,096 bytes" in text
    equal = inference_report.build_speed_line(make_result(widths=(8, 8)), CASE, "prefill")
    assert equal[2] == "8"


def test_peak_memory_is_that_since_the_start() -> None:
    begun = start_peak("cpu")
    torch.ones(2**24).sum()
    assert read_peak("cpu") - begun > 2**26 * 0.9
    assert start_peak("cpu") - begun < 2**25


@pytest.mark.parametrize("threads", [1, 2])
def test_seconds_of_one_thread_are_the_processors(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    begun = read_clock("cpu")
    time.sleep(0.3)
    waited = read_clock("cpu") - begun
    said = measuring.describe_machine("cpu")
    torch.set_num_threads(before)
    assert waited < 0.1 if threads == 1 else waited >= 0.3
    assert ("seconds of the processor" in said) == (threads == 1)


def test_random_models_share_no_config() -> None:
    first, second = (measuring.make_model(measuring.GEOMETRIES["tiny"], torch.bfloat16, "cpu") for _ in range(2))
    assert first.config is not second.config and first.dtype == torch.bfloat16
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)


def test_the_exponent_of_a_power_is_found() -> None:
    sizes = [2.0, 4.0, 8.0, 16.0]
    assert growth.fit_exponent(sizes, [3 * size**1.7 for size in sizes]) == pytest.approx(1.7)
    noisy = [seconds * factor for seconds, factor in zip(sizes, (1.1, 0.9, 0.9, 1.1), strict=True)]
    assert growth.fit_exponent(sizes, noisy) == pytest.approx(1.0)


def make_points() -> growth.Points:
    return {
        "layers": [(size, {"scores of fisher": size**1.0, "least squares": 2.0 * size}) for size in (2, 4, 8)],
        "width": [(size, {"scores of fisher": size**2.0, "least squares": size**3.0}) for size in (128, 256)],
    }


def test_growth_is_told_and_drawn_by_exponents(tmp_path: Path) -> None:
    text = growth.describe(make_points(), growth.BASE, 3)
    assert "| exponent (seconds) | layers, 2 to 8 | width, 128 to 256 |" in text
    assert "| scores of fisher | 1.00 (2.00 to 8.00) | 2.00 (16384.00 to 65536.00) |" in text
    assert "| least squares | 1.00 (4.00 to 16.00) | 3.00 (" in text
    assert "2 layers, width 256, 2,048 tokens" in text and "3 turns" in text
    growth.draw(make_points(), tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 5000


def test_growth_measures_every_part_at_every_size() -> None:
    base = growth.Size(1, 128, 256)
    points = growth.measure(base, {"layers": (1, 2), "tokens": (256,)}, turns=1)
    assert [size for size, _ in points["layers"]] == [1, 2] and [size for size, _ in points["tokens"]] == [256]
    parts = {"scores of fisher", "scores of obs", "least squares", "least squares and refinement"}
    assert all(set(seconds) == parts for own in points.values() for _, seconds in own)
    assert all(value > 0 for own in points.values() for _, seconds in own for value in seconds.values())


def run_tiny(cap: int | None = None) -> list[gpu.Row]:
    rows: list[gpu.Row] = []
    gpu.run_stages("tiny", cap, "cpu", 1, rows.append)
    return rows


def fail(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("no more")


def test_every_stage_of_a_geometry_is_measured() -> None:
    rows = run_tiny()
    assert [row.stage for row in rows] == list(gpu.STAGES)
    assert all(row.seconds > 0 and row.peak > 2**20 and row.outcome == "done" for row in rows)


@pytest.mark.parametrize("part", ["fisher", "both", "repair"])
def test_a_stage_that_does_not_fit_says_so_and_the_others_go_on(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if part == "repair":
        monkeypatch.setattr(gpu, "apply_plan_with_repair", fail)
    else:
        real: Callable[..., Any] = gpu.score_units
        broken = ("fisher",) if part == "fisher" else ("fisher", "obs")
        monkeypatch.setattr(gpu, "score_units", lambda m, b, x, name: (fail if name in broken else real)(m, b, x, name))
    failed = {"fisher": [1], "both": [1, 2], "repair": [3]}[part]
    outcomes = [row.outcome for row in run_tiny()]
    assert outcomes == ["**out of memory**" if index in failed else "done" for index in range(4)]


def test_a_cap_makes_layers_checkpoint_their_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, real = [], gpu.score_units
    monkeypatch.setattr(
        gpu, "score_units", lambda model, *rest: seen.append(model.is_activation_checkpointing) or real(model, *rest)
    )
    run_tiny()
    run_tiny(cap=24)
    assert seen == [False, False, True, True]


def test_the_plan_of_the_scores_removes_what_the_config_says() -> None:
    model = measuring.make_model(measuring.GEOMETRIES["tiny"], torch.float32, "cpu")
    config = gqaprune.PruningConfig(criterion="l2", allocation="uniform", repair={"method": "none", "epochs": 0})
    scores = gpu.score_units(model, gpu.select_blocks(model, config), [], "l2")
    assert gpu.choose_units(model, config, scores).layers == gqaprune.prune(model, [], config)[0].layers


@pytest.mark.parametrize("seconds", [0.0, 0.1])
def test_what_time_left_out_says_so(seconds: float) -> None:
    rows = gpu.run_apart("tiny", None, "cpu", 0, seconds)
    assert [(row.stage, row.outcome) for row in rows] == [(stage, "no time left") for stage in gpu.STAGES]


def test_a_run_ends_with_its_table_which_results_have_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        gpu.main(["--device", "cpu", "--geometry", "tiny", "--epochs", "1", "--results", str(tmp_path / "r.md")]) == 0
    )
    text, printed = (tmp_path / "r.md").read_text(), capsys.readouterr().out.rstrip()
    lines = printed.splitlines()[-4:]
    assert [line.split(" | ")[0] for line in lines] == [f"| {stage}" for stage in gpu.STAGES]
    assert all(line.endswith("| done |") and line in text for line in lines)
    assert "<!-- gpu-tiny:begin -->" in text and "4 windows of 32 random tokens" in text
    assert "refinement after them: 1." in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_what_can_be_tried(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no CUDA device: .* --device cpu --geometry tiny"):
        gpu.main(["--results", str(tmp_path / "r.md")])


def test_every_line_of_the_speed_table_is_measured_against_a_forward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(speed, "measure_apart", lambda name, options: 3 * 2**20)
    arguments = ["--geometry", "tiny", "--windows", "4", "--window", "32", "--batch", "2", "--turns", "1"]
    assert speed.main([*arguments, "--results", str(tmp_path / "R.md")]) == 0
    text = (tmp_path / "R.md").read_text()
    rows = {row[1].strip(): row[2:-1] for row in (line.split("|") for line in text.splitlines() if line[:1] == "|")}
    assert {*speed.LINES, "GAQ-Aware-Prune's schedule: 8 of both"} < rows.keys()
    assert rows["forward"][2].strip() == "1.00" and rows["prune as by default"][3].strip() == "3"
    assert text.split(speed.BEGIN)[1].split("|")[0].strip() in capsys.readouterr().out


def test_the_others_schedule_is_one_pass_with_gradients_and_one_perplexity_for_each_layer() -> None:
    seconds = {
        "forward": [2.0],
        "element-wise Taylor, gradients kept": [6.0, 9.0, 7.0],
        "perplexity, plain loop": [3.0],
    }
    _, rows = speed.build_table(seconds, {"forward": 2**20}, 30, 0)
    assert rows[-1] == ["GAQ-Aware-Prune's schedule: 30 of both", "300.0", "counted", "150.00", ""]
    assert rows[1][1:4] == ["7.0", "6.0 to 9.0", "3.50"] and rows[0][4] == "1"


def read_variables(name: str, options: argparse.Namespace) -> int:
    """Runs in another process in the place of what measures there."""
    (value,) = {int(os.environ[name]) for name in measuring.MALLOC}
    return value


def test_the_floor_of_memory_is_a_forward_of_one_window_and_every_layers_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "measure_apart", lambda name, options: 2**20)
    lines = ["forward", "forward of one window"]
    arguments = ["--geometry", "tiny", "--windows", "2", "--window", "2048", "--turns", "1", "--lines", *lines]
    assert speed.main([*arguments, "--results", str(tmp_path / "R.md")]) == 0
    (floor,) = [line for line in (tmp_path / "R.md").read_text().splitlines() if line.startswith("| floor")]
    assert floor.split("|")[-2].strip() == "3"  # 1 MiB and 8 layers of 2,048 tokens of 64 numbers of 2 bytes


def test_peaks_are_those_of_a_process_that_gives_back_what_is_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "measure_peak", read_variables)
    assert speed.measure_apart("forward", argparse.Namespace()) == 2**16
    assert not measuring.MALLOC.keys() & os.environ.keys()


def test_lines_leave_the_model_as_it_was_but_for_those_that_cut() -> None:
    config = measuring.GEOMETRIES["tiny"]
    model = measuring.make_model(config, torch.float32, "cpu").requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, line in speed.LINES.items():
        if name not in speed.CUTTING:
            line(model, measuring.make_tokens(config, 2, 16).split(1))
            assert all(p.grad is None and not p.requires_grad for p in model.parameters()), name
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(layer.gradient_checkpointing for layer in model.model.layers)


def test_the_wide_mlps_parts_are_measured_apart_and_told_in_megabytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Measured in one process here: what a process of its own takes to start is no part of the test."""
    small = ["--hidden", "64", "--width", "160", "--tokens", "1024", "--dtype", "float32"]
    grown = []

    class Here:
        def __enter__(self) -> "Here":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def apply(self, work: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[int, int, float]:
            grown.append(work(*arguments))
            return 7_000_000, 23_000_000, 1234.56

    monkeypatch.setattr(wide, "get_context", lambda _: type("Context", (), {"Pool": lambda self, count: Here()})())
    assert wide.main([*small, "--results", str(tmp_path / "R.md")]) == 0
    text = (tmp_path / "R.md").read_text()
    assert len(grown) == len(wide.PARTS) and all(seconds > 0 for _, _, seconds in grown)
    for part in wide.PARTS:
        assert f"| {part} | 7 | 23 | 1,234.6 |" in text
    assert "hidden size 64, 160 channels, random float32 weights; 1,024 random tokens" in capsys.readouterr().out


def test_watched_memory_is_the_most_that_it_grew_and_of_which_kind(tmp_path: Path) -> None:
    size = 2**27  # far above what freed memory of earlier tests can hide
    with measuring.watch_memory() as growth:
        own = torch.ones(size, dtype=torch.uint8)
        time.sleep(0.1)
        del own  # before the end
    assert size / 2 < growth["RssAnon"] < 2 * size
    (tmp_path / "f").write_bytes(bytes(size))
    with measuring.watch_memory() as growth:
        mapped = torch.from_file(str(tmp_path / "f"), shared=True, size=size, dtype=torch.uint8)
        mapped.max()  # its pages are there from now on
        time.sleep(0.1)
        del mapped
    assert growth["RssFile"] > size / 2 > growth["RssAnon"]


def test_threads_are_compared_with_one_thread_in_the_same_place() -> None:
    keys = [(way, place) for way in contention.WAYS for place in contention.PLACES]
    seconds = dict(zip(keys, (2.0, 4.0, 8.0, 1.0, 40.0, 80.0, 1.5, 3.0, 12.0), strict=True))
    table = contention.describe(seconds, 0.5, argparse.Namespace(turns=3))
    assert "| two threads, torch's wait policy | 1.00 (0.50×) | 40.00 (10.00×) | 80.00 (10.00×) |" in table
    assert "| two threads, ours | 1.50 (0.75×) | 3.00 (0.75×) | 12.00 (1.50×) |" in table
