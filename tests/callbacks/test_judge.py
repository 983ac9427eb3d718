"""`gqaprune predict`: the numbers of its file are those computed directly, and its verdicts what the texts are."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Trainer

import gqaprune
from gqaprune.callbacks import PredictionJudge
from gqaprune.cli import main
from gqaprune.common.console import console
from gqaprune.datamodules import TextDataModule
from gqaprune.evaluation.repetition import measure_distinct, measure_repetition
from gqaprune.models.fingerprint import fingerprint_weights
from gqaprune.module import CausalLMModule
from gqaprune.plan import PruningPlan
from gqaprune.planning.selection import keep_everything

from tiny import CHAT_TEMPLATE, make_counting_model, make_tokenizer

Predict = Callable[..., dict[str, Any]]
SIZE = 24


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A folder with a dense model that counts, and two that it is the base of: one as good, one that says one thing."""
    folder = tmp_path / "models"
    dense = make_counting_model(1)
    plan = replace(keep_everything(dense), model=str(folder / "dense"))
    for name, model in (("dense", dense), ("good", make_counting_model(1)), ("stuck", make_counting_model(0))):
        gqaprune.save(model, make_tokenizer(), folder / name, None if name == "dense" else plan)
    return folder


@pytest.fixture
def predict(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Predict:
    """Run the command in an empty folder; returns what its file holds."""
    trainer = {"accelerator": "cpu", "enable_progress_bar": False, "logger": True}
    settings = {"model": {"dtype": "float32", "max_new_tokens": SIZE}, "trainer": trainer}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(name: str, *arguments: str, code: int = 0) -> dict[str, Any]:
        command = ["predict", "--config", str(tmp_path / "tiny.yaml"), "--model.pretrained", str(models / name)]
        monkeypatch.setattr("sys.argv", ["gqaprune", *command, *arguments])
        assert main() == code
        if code:
            return {}
        newest = max(Path("lightning_logs").iterdir(), key=lambda path: int(path.name.removeprefix("version_")))
        return dict(json.loads((newest / "predictions.json").read_text(encoding="utf-8")))

    return run


def test_plan_that_names_its_own_checkpoint_gives_no_dense_model(models: Path, predict: Predict) -> None:
    plan = PruningPlan.load(models / "stuck/plan.json")
    replace(plan, model=str(models / "stuck")).save(models / "stuck/plan.json")
    found = predict("stuck")
    assert not found["dense"] and "names itself; set --model.recovery.teacher" in found["note"]


def measure_by_hand(folder: Path, prompt: str, answer: list[int]) -> float:
    """Perplexity of an answer after its prompt, from all logits of one forward pass."""
    model, tokenizer = gqaprune.load(folder)
    given = tokenizer(prompt)["input_ids"]
    with torch.no_grad():
        logits = model(torch.tensor([[*given, *answer]])).logits[0].log_softmax(-1)
    losses = [-logits[len(given) + place - 1, token].item() for place, token in enumerate(answer)]
    return math.exp(sum(losses) / len(losses))


def test_file_holds_what_is_computed_directly_and_the_loop_is_called_one(
    predict: Predict, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console.quiet = False
    found = predict("stuck", "--data.prompts", "[AB, mo]")
    assert (found["model"], found["dense"], found["note"]) == (str(models / "stuck"), str(models / "dense"), "")
    tokenizer = make_tokenizer()
    for prompt, row in zip(("AB", "mo"), found["prompts"], strict=True):
        last = tokenizer(prompt)["input_ids"][-1]
        for name, step in (("pruned", 0), ("dense", 1)):
            answer = [(last + step * (place + 1)) % 256 for place in range(SIZE)]
            text = row[name]
            assert (text["text"], text["tokens"], text["ended"]) == (tokenizer.decode(answer), SIZE, False)
            assert text["repetition"] == measure_repetition(answer) == (1.0 if name == "pruned" else 0.0)
            assert text["distinct"] == [measure_distinct(answer, length) for length in (1, 2, 3)]
            expected = measure_by_hand(models / "dense", prompt, answer)
            assert text["perplexity"] == pytest.approx(expected, rel=1e-4)
        assert row["prompt"] == prompt
        assert row["verdict"] == {"level": "broken", "reason": f"repeats “{prompt[-1]}” to the end, {SIZE} times"}
    assert found["verdict"] == {"level": "broken", "reason": "of 2 texts 2 broken"}

    shown = capsys.readouterr().out
    assert "BBBBBB" in shown and "CDEFGH" in shown and "❌ broken: repeats “B” to the end" in shown
    assert (
        "all prompts: ❌ broken: of 2 texts 2 broken" in shown and "lightning_logs/version_0/predictions.json" in shown
    )
    page = Path("lightning_logs/version_0/report.html").read_text(encoding="utf-8")
    assert "<p>✗ broken: of 2 texts 2 broken</p>" in page and page.count("<figcaption>dense</figcaption>") == 2


def test_a_model_that_writes_what_the_dense_one_does_is_fine(predict: Predict) -> None:
    found = predict("good", "--data.prompts", "[AB]")
    (row,) = found["prompts"]
    assert row["pruned"] == row["dense"] and row["verdict"]["reason"] == "the dense model's own text"
    assert found["verdict"] == {"level": "fine", "reason": "of 1 texts 1 fine"}


@pytest.mark.parametrize("releases", [False, True])
def test_a_trained_model_outlives_its_judgement(models: Path, tmp_path: Path, releases: bool) -> None:
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=tmp_path, inference_mode=False
    )
    module = CausalLMModule(str(models / "good"), max_new_tokens=SIZE)
    module.load()
    trained = module.model.lm_head.weight.data.add_(1).clone()
    data = TextDataModule(str(models / "good"), prompts=["[AB]"])
    trainer.callbacks.append(PredictionJudge(releases))
    trainer.predict(module, datamodule=data)
    module.load()
    assert torch.equal(module.model.lm_head.weight, trained) != releases


def test_the_dense_model_is_the_teacher_or_what_the_plan_cuts_or_none(
    predict: Predict, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data.prompts", "[AB]"]
    dense, good = str(models / "dense"), str(models / "good")
    assert predict("stuck", *arguments, "--model.recovery.teacher", good)["dense"] == good
    assert predict("dense", *arguments, "--model.plan", f"{good}/plan.json")["dense"] == dense

    console.quiet = False
    capsys.readouterr()
    (models / "stuck/plan.json").unlink()
    found = predict("stuck", *arguments)
    assert found["dense"] is None and found["prompts"][0]["dense"] is None
    assert found["prompts"][0]["pruned"]["perplexity"] is None
    assert found["prompts"][0]["verdict"]["level"] == "broken"
    shown = " ".join(capsys.readouterr().out.split())
    assert "no dense model to compare with, so the verdicts detect repetition" in shown
    assert "has no plan that names the dense model; set --model.recovery.teacher to the dense model" in shown

    plan = models / "good/plan.json"
    plan.write_text(plan.read_text().replace(str(models / "dense"), "./gone"))
    assert "no model at ./gone" in predict("good", *arguments)["note"]


def test_a_teacher_that_is_not_there_is_an_error_before_any_work(
    predict: Predict, capsys: pytest.CaptureFixture[str]
) -> None:
    predict("stuck", "--model.recovery.teacher", "./gone", code=1)
    assert "no model at ./gone" in capsys.readouterr().err


def test_prompts_of_a_file_go_through_the_chat_template_as_settings_say(predict: Predict, models: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(models / "good")
    messages = [{"role": "user", "content": "Hi"}]
    Path("prompts.jsonl").write_text(f'"A~"\n{json.dumps({"messages": messages})}\n')
    found = predict("good", "--data.prompts", "prompts.jsonl")
    assert [row["prompt"] for row in found["prompts"]] == ["A~", "Hi"]
    after_template = tokenizer.decode([(tokenizer(" ")["input_ids"][0] + place + 1) % 256 for place in range(SIZE)])
    assert [row["pruned"]["text"] for row in found["prompts"]] == [after_template] * 2
    Path("prompts.txt").write_text("AB\n")
    plain = predict("good", "--data.prompts", "prompts.txt", "--data.chat", "false")
    assert plain["prompts"][0]["pruned"]["text"].startswith("CDEF")


def test_an_answer_that_ends_at_once_is_empty_and_its_end_has_a_perplexity(predict: Predict, models: Path) -> None:
    model, tokenizer = gqaprune.load(models / "stuck")
    with torch.no_grad():  # whatever comes, the end is likeliest
        model.lm_head.weight.zero_()
        model.lm_head.weight[257] = 1e-3 * model.model.embed_tokens.weight[tokenizer("B")["input_ids"][0]]
    plan = gqaprune.PruningPlan.load(models / "stuck/plan.json")
    gqaprune.save(model, tokenizer, models / "stuck", plan)
    (row,) = predict("stuck", "--data.prompts", "[AB]")["prompts"]
    assert row["verdict"] == {"level": "broken", "reason": "empty"}
    assert (row["pruned"]["tokens"], row["pruned"]["ended"], row["pruned"]["distinct"]) == (0, True, [None] * 3)
    assert row["pruned"]["perplexity"] == pytest.approx(measure_by_hand(models / "dense", "AB", [257]), rel=1e-4)


def test_a_model_that_took_the_dense_ones_name_is_not_compared_with(predict: Predict, models: Path) -> None:
    plan = PruningPlan.load(models / "good/plan.json")
    replace(plan, fingerprint=fingerprint_weights(models / "dense")).save(models / "good/plan.json")
    assert predict("good", "--data.prompts", "[AB]")["dense"] == str(models / "dense")
    shutil.rmtree(models / "dense")
    gqaprune.save(make_counting_model(2), make_tokenizer(), models / "dense")
    found = predict("good", "--data.prompts", "[AB]")
    assert found["dense"] is None and "dense is not the model that the plan was made for" in found["note"]
    assert found["note"].endswith("; set --model.recovery.teacher to the dense model")


def test_a_prompt_that_fills_the_context_is_refused_and_text_ends_with_it(
    predict: Predict, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = predict("good", "--data.prompts", f"[{'A' * 250}]")["prompts"]
    assert row["pruned"]["text"] == "BCDEFG" and row["pruned"] == row["dense"]
    predict("good", "--data.prompts", f"[{'A' * 256}]", code=1)
    assert "a prompt has 256 tokens, but the model's context is 256: give a shorter prompt" in capsys.readouterr().err


def test_predictions_do_not_follow_the_generation_config(predict: Predict, models: Path) -> None:
    wishes = {"return_dict_in_generate": True, "num_beams": 2, "max_time": 1e-9, "suppress_tokens": [66, 67]}
    for name in ("dense", "good"):
        (models / name / "generation_config.json").write_text(json.dumps(wishes))
    (row,) = predict("good", "--data.prompts", "[AB]")["prompts"]
    assert row["pruned"]["text"] == row["dense"]["text"] == "".join(chr(67 + place) for place in range(SIZE))
