"""Sample generations in TensorBoard: what the model writes at each validation, and that writing it changes nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gqaprune.callbacks import SampleGenerations, TaylorPruning
from gqaprune.common.console import console
from gqaprune.datamodules import TextDataModule
from gqaprune.models.loading import load_model
from gqaprune.module import CausalLMModule

PROMPTS = ["Once upon", "#1 <b>\nHello", "Never shown"]


def train(folder: Path, out: Path, samples: SampleGenerations | None, rate: float = 0.0) -> CausalLMModule:
    """Two epochs of two steps with a validation in each, after a sanity check."""
    data = TextDataModule(
        str(folder),
        calibration={"corpora": []},
        training={"window": 32, "tokens": 64, "batch_size": 1},
        evaluation={"window": 32, "tokens": 64},
        prompts=PROMPTS,
    )
    module = CausalLMModule(str(folder), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=TensorBoardLogger(out, version=0, default_hp_metric=False),
        callbacks=[
            TaylorPruning(rate=rate, criterion="l1", allocation="uniform", repair={"method": "none"}),
            *([] if samples is None else [samples]),
        ],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, datamodule=data)
    return module


def read_texts(out: Path) -> dict[str, list[tuple[int, str]]]:
    events = EventAccumulator(str(out / "lightning_logs/version_0"))
    events.Reload()
    tags = [tag for tag in events.Tags()["tensors"] if tag.startswith("samples/")]
    return {tag: [(e.step, e.tensor_proto.string_val[0].decode()) for e in events.Tensors(tag)] for tag in tags}


def continue_by_hand(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    """The likeliest token after another, each from a forward pass over all before it."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    size = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(input_ids=ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == model.config.eos_token_id:
                break
    return str(tokenizer.decode(ids[0, size:], skip_special_tokens=True))


def show(*texts: str) -> str:
    blocks = ("\n".join(f"    {line}" for line in text.splitlines() or [""]) for text in texts)
    return "\n\n→\n\n".join(blocks)


def test_continuations_are_logged_before_training_and_at_each_validation(
    tiny_folder: Path, tmp_path: Path, tokenizer: Any
) -> None:
    module = train(tiny_folder, tmp_path, samples := SampleGenerations(prompts=2, max_new_tokens=6))
    texts = read_texts(tmp_path)
    assert set(texts) == {"samples/1/text_summary", "samples/2/text_summary"}
    for prompt, logged in zip(PROMPTS, texts.values(), strict=False):
        dense = continue_by_hand(load_model(tiny_folder), tokenizer, prompt, 6)
        assert [step for step, _ in logged] == [0, 2, 4]
        assert logged[0][1] == show(prompt, dense, dense)
        assert logged[-1][1] == show(prompt, dense, continue_by_hand(module.model.eval(), tokenizer, prompt, 6))
    assert any(logged[0][1] != logged[-1][1] for logged in texts.values())
    for (prompt, kept), logged in zip(samples.written.values(), texts.values(), strict=True):
        assert list(kept) == [-1, 0, 2, 4]
        assert [(step, show(prompt, kept[-1], text)) for step, text in kept.items() if step >= 0] == logged


def test_the_dense_models_answers_are_of_before_the_cut(tiny_folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    train(tiny_folder, tmp_path, samples := SampleGenerations(prompts=2, max_new_tokens=6), rate=0.4)
    dense = [continue_by_hand(load_model(tiny_folder), tokenizer, prompt, 6) for prompt in PROMPTS[:2]]
    assert [texts[-1] for _, texts in samples.written.values()] == dense
    assert [texts[0] for _, texts in samples.written.values()] != dense
    resumed = SampleGenerations()
    resumed.load_state_dict(samples.state_dict())
    assert resumed.written == samples.written


def test_training_gives_the_same_weights_with_and_without_samples(tiny_folder: Path, tmp_path: Path) -> None:
    weights = []
    for name, samples in (("without", None), ("none", SampleGenerations(prompts=0)), ("with", SampleGenerations())):
        torch.manual_seed(0)
        module = train(tiny_folder, tmp_path / name, samples)
        assert module.model.training
        weights.append(module.model.state_dict())
    assert not read_texts(tmp_path / "without") and not read_texts(tmp_path / "none") and read_texts(tmp_path / "with")
    assert all(torch.equal(weights[0][name], other[name]) for other in weights[1:] for name in other)


def test_a_model_that_is_sharded_gets_no_samples_and_a_sentence(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    console.quiet = False
    monkeypatch.setattr("gqaprune.callbacks.samples.is_sharded", lambda model: True)
    train(tiny_folder, tmp_path, SampleGenerations())
    assert not read_texts(tmp_path)
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.count("SampleGenerations is off: SingleDeviceStrategy shards the model") == 1


def test_numbers_out_of_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="got -1 and 30; set samples.prompts to 0"):
        SampleGenerations(prompts=-1)
    with pytest.raises(ValueError, match="got 3 and 0"):
        SampleGenerations(max_new_tokens=0)


@pytest.mark.parametrize("error", [RuntimeError("out of memory\nand so on"), ValueError("too long"), IndexError()])
def test_a_sample_that_fails_is_said_and_the_run_goes_on(
    tiny_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    console.quiet = False
    monkeypatch.setattr("gqaprune.callbacks.samples.continue_greedily", fail)
    module = train(tiny_folder, tmp_path, samples := SampleGenerations(prompts=1))
    assert module.trainer.global_step == 4 and module.model.training and not samples.written
    reason = str(error).split("\n")[0] or "IndexError"
    assert capsys.readouterr().out.count(f"sample 1 is left out: {reason}\n") == 4


def test_samples_are_greedy_whatever_the_generation_config_asks(tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    wishes = {"return_dict_in_generate": True, "num_beams": 3, "stop_strings": ["e"], "eos_token_id": 257}
    (folder / "generation_config.json").write_text(json.dumps(wishes))
    texts = []
    for name, source in (("plain", tiny_folder), ("own", folder)):
        train(source, tmp_path / name, SampleGenerations())
        texts.append(read_texts(tmp_path / name))
    assert texts[0] == texts[1] and texts[0]
