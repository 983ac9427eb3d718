"""Distillation losses are the formulas, by value and by gradient, in chunks or not."""

import pytest
import torch

from gqaprune import distillation
from gqaprune.distillation import measure_distance, measure_divergence


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [4, 1024])
def test_divergence_and_its_gradient_are_those_of_the_formula(
    temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation, "_CHUNK_TOKENS", chunk)
    student_BTV, teacher_BTV = torch.randn(2, 2, 7, 11)
    student_BTV.requires_grad_()
    value = measure_divergence(student_BTV, teacher_BTV, temperature)
    (gradient,) = torch.autograd.grad(value, student_BTV)

    teacher_p = torch.softmax(teacher_BTV.double() / temperature, -1)
    student_p = torch.softmax(student_BTV.double() / temperature, -1)
    expected = temperature**2 * (teacher_p * (teacher_p / student_p).log()).sum(-1).mean()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient.double(), temperature * (student_p - teacher_p) / 14, rtol=1e-4, atol=1e-6)


def test_equal_predictions_do_not_diverge() -> None:
    logits_BTV = torch.randn(2, 5, 9)
    assert float(measure_divergence(logits_BTV, logits_BTV + 3)) == pytest.approx(0, abs=1e-6)


def test_distance_is_relative_to_each_tokens_teacher() -> None:
    teacher_BTD = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    student_BTD = torch.tensor([[[3.0, 4.0], [1.0, 1.0]]])
    assert float(measure_distance([student_BTD, teacher_BTD], [teacher_BTD, teacher_BTD])) == pytest.approx(0.25)
