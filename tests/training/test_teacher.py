"""Predictions on disk are the teacher's, are written once, and stand for it in training."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from test_module import make_data, make_trainer

from gqaprune import load_model
from gqaprune.callbacks import TaylorPruning
from gqaprune.module import CausalLMModule
from gqaprune.training.recovery import RecoveryConfig
from gqaprune.training.teacher import cache_teacher

from tiny import PLAIN, make_model, make_tokens


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_predictions_are_the_teachers(tmp_path: Path, temperature: float) -> None:
    teacher, windows = make_model("llama").eval(), make_tokens(70, 12)  # more than one file
    cached = cache_teacher(teacher, windows, 5, temperature, batch_size=3, cache=tmp_path)
    index = torch.tensor([69, 0, 63, 64])
    with torch.no_grad():
        expected = torch.log_softmax(teacher(windows[index]).logits[:, :-1] / temperature, -1).topk(5)
    predicted = cached.predict(index)
    torch.testing.assert_close(predicted.log_probability_BTK, expected.values, rtol=1e-3, atol=1e-3)
    assert torch.equal(predicted.token_BTK, expected.indices)
    assert sum(file.stat().st_size for file in cached.folder.iterdir()) == pytest.approx(70 * 11 * 5 * 6, rel=0.05)


def test_what_is_on_disk_is_not_computed_again_and_what_is_missing_or_damaged_is(tmp_path: Path) -> None:
    teacher, windows = make_model("llama").eval(), make_tokens(130, 12)
    folder = cache_teacher(teacher, windows, 5, cache=tmp_path).folder
    files = sorted(folder.iterdir())
    kept, before = files[0].stat().st_mtime_ns, files[1].read_bytes()
    files[1].unlink()
    flipped = bytearray(files[2].read_bytes())
    flipped[-1] ^= 1
    files[2].write_bytes(flipped)
    assert cache_teacher(teacher, windows, 5, cache=tmp_path).folder == folder
    assert files[0].stat().st_mtime_ns == kept and files[1].read_bytes() == before
    assert files[2].read_bytes()[-1] == flipped[-1] ^ 1
    others = [(make_model("qwen3").eval(), windows, 5, 1.0), (teacher, windows + 0, 6, 1.0), (teacher, windows, 5, 2.0)]
    folders = {cache_teacher(*other, cache=tmp_path).folder for other in others}  # type: ignore[arg-type]
    assert len(folders | {folder}) == 4
    assert cache_teacher(teacher, windows.flip(0), 5, cache=tmp_path).folder != folder


@pytest.mark.parametrize("mode", ["distill", "lora+distill"])
def test_training_from_disk_is_training_from_the_teacher(
    tiny_folder: Path, tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gqaprune.training.objective.cache_teacher", partial(cache_teacher, cache=tmp_path / "cache"))
    vocabulary, models = load_model(tiny_folder).config.vocab_size, []
    for top_k in (0, vocabulary):
        settings: dict[str, Any] = {**PLAIN, "rate": 0.3, "allocation": "uniform"}
        module = CausalLMModule(
            str(tiny_folder),
            recovery=RecoveryConfig(mode, lora_rank=4, temperature=2.0, teacher_top_k=top_k),
            optimizer=partial(torch.optim.SGD, lr=1e-2 if mode == "distill" else 0.05),  # Adam would magnify rounding
        )
        trainer = make_trainer(tmp_path, TaylorPruning(**settings), max_epochs=2)
        trainer.fit(
            module, datamodule=make_data(tiny_folder, training={"batch_size": 3})
        )  # shuffled: places must be the right ones
        models.append(module.model.eval())
    tokens = make_tokens(2, 20)
    torch.testing.assert_close(models[0](tokens).logits, models[1](tokens).logits, rtol=1e-2, atol=5e-3)
    assert module._objective.cached_teacher is not None and module._objective.teacher is None  # let go


def test_a_teacher_that_overflows_is_refused(tmp_path: Path) -> None:
    teacher = make_model("llama").eval()
    with torch.no_grad():
        teacher.model.embed_tokens.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="the teacher's logits are not finite in training windows 0 and later"):
        cache_teacher(teacher, make_tokens(4, 12), 5, cache=tmp_path)
    assert not [file for folder in tmp_path.iterdir() for file in folder.iterdir()]


@pytest.mark.parametrize("top_k", [0, 10**6])
def test_impossible_numbers_of_tokens_are_refused(tmp_path: Path, top_k: int) -> None:
    with pytest.raises(ValueError, match=f"teacher_top_k must be 1 to .*, got {top_k}"):
        cache_teacher(make_model("llama").eval(), make_tokens(4, 12), top_k, cache=tmp_path)
