"""Distillation losses are the formulas, by value and by gradient, in chunks or not."""

import pytest
import torch

from gqaprune.models.soft_targets import Predictions, measure_distance, measure_divergence, measure_divergence_from_top


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("logits", [44, 1024])
def test_divergence_and_its_gradient_are_those_of_the_formula(
    temperature: float, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gqaprune.models.losses.PIECE_LOGITS", logits)
    student_BTV, teacher_BTV = torch.randn(2, 2, 7, 11)
    student_BTV.requires_grad_()
    value = measure_divergence(student_BTV, teacher_BTV, temperature)
    (gradient,) = torch.autograd.grad(value, student_BTV)

    teacher_p = torch.softmax(teacher_BTV.double() / temperature, -1)
    student_p = torch.softmax(student_BTV.double() / temperature, -1)
    expected = temperature**2 * (teacher_p * (teacher_p / student_p).log()).sum(-1).mean()
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient.double(), temperature * (student_p - teacher_p) / 14, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("top_k", [1, 4, 9])
def test_divergence_from_the_likeliest_takes_all_others_as_one(temperature: float, top_k: int) -> None:
    student_BTV, teacher_BTV = torch.randn(2, 2, 7, 11)
    student_BTV.requires_grad_()
    teacher_logp = torch.log_softmax(teacher_BTV / temperature, -1)
    predictions = Predictions(*teacher_logp.topk(top_k))
    value = measure_divergence_from_top(student_BTV, predictions, temperature)
    (gradient,) = torch.autograd.grad(value, student_BTV)

    teacher_p, student_p = (torch.softmax(t.double() / temperature, -1) for t in (teacher_BTV, student_BTV))
    token = predictions.token_BTK
    merged = [
        torch.cat([top := p.gather(-1, token), 1 - top.sum(-1, keepdim=True)], -1) for p in (teacher_p, student_p)
    ]
    expected = temperature**2 * (merged[0] * (merged[0] / merged[1]).log()).sum(-1).mean()
    (expected_gradient,) = torch.autograd.grad(expected, student_BTV)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)
    assert 0 < float(value) < float(measure_divergence(student_BTV, teacher_BTV, temperature))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_narrow_types_are_those_of_float32_rounded(dtype: torch.dtype) -> None:
    student_BTV, teacher_BTV = torch.randn(2, 2, 7, 1000).to(dtype)
    gradients = []
    for own_BTV in (student_BTV.clone(), student_BTV.float()):
        loss = 4096 * measure_divergence(own_BTV.requires_grad_(), teacher_BTV)  # as a scaler has it
        gradients += torch.autograd.grad(loss, own_BTV)
    assert gradients[0].dtype == dtype
    torch.testing.assert_close(gradients[0].float(), gradients[1], rtol=2e-2, atol=1e-4)


def test_the_likeliest_may_be_all() -> None:
    student_BTV, teacher_BTV = torch.randn(2, 2, 7, 11)
    predictions = Predictions(*torch.log_softmax(teacher_BTV, -1).topk(11))
    value = measure_divergence_from_top(student_BTV.requires_grad_(), predictions)
    torch.testing.assert_close(value, measure_divergence(student_BTV, teacher_BTV))
    (gradient,) = torch.autograd.grad(value, student_BTV)
    assert torch.isfinite(gradient).all()


def test_equal_predictions_do_not_diverge() -> None:
    logits_BTV = torch.randn(2, 5, 9)
    assert float(measure_divergence(logits_BTV, logits_BTV + 3)) == pytest.approx(0, abs=1e-6)


def test_distance_is_relative_to_each_tokens_teacher() -> None:
    teacher_BTD = torch.tensor([[[3.0, 4.0], [0.0, 1.0]]])
    student_BTD = torch.tensor([[[3.0, 4.0], [1.0, 1.0]]])
    assert float(measure_distance([student_BTD, teacher_BTD], [teacher_BTD, teacher_BTD])) == pytest.approx(0.25)
