"""Losses: per sample, in float32, and the same whatever the pieces that logits come in."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, log_softmax

import gqaprune.models.losses
from gqaprune.models.gates import freeze_parameters
from gqaprune.models.layerwise import run_decoder
from gqaprune.models.losses import (
    IGNORED,
    count_scored,
    differentiate_losses,
    measure_losses,
    measure_mean_loss,
    sum_token_losses,
)

from tiny import VOCABULARY, make_model, make_tokens


def list_token_losses(logits: Tensor, ids: Sequence[int]) -> list[float]:
    scores = log_softmax(logits.double(), dim=-1)
    return [-float(scores[position - 1, token]) for position, token in enumerate(ids) if position > 0]


@pytest.fixture(params=[1, 7, 1000])
def piece(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Positions whose logits exist at once, for batches of two samples."""
    monkeypatch.setattr(gqaprune.models.losses, "PIECE_LOGITS", request.param * 2 * VOCABULARY)
    return int(request.param)


def test_losses_are_summed_and_counted_sample_by_sample() -> None:
    logits, labels = torch.randn(2, 5, 9), torch.randint(0, 9, (2, 5))
    labels[1, :3] = IGNORED
    sums, counts = sum_token_losses(logits, labels)
    assert counts.tolist() == [4, 2]
    assert float(sums[0]) == pytest.approx(sum(list_token_losses(logits[0], labels[0].tolist())), rel=1e-5)


def test_losses_of_bfloat16_logits_are_computed_in_float32() -> None:
    logits, labels = (torch.randn(1, 50, 300) * 4).bfloat16(), torch.randint(0, 300, (1, 50))
    sums, _ = sum_token_losses(logits, labels)
    assert sums.dtype == torch.float32
    assert float(sums[0]) == pytest.approx(sum(list_token_losses(logits[0], labels[0].tolist())), rel=1e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("logits", [300, 2000, 10**6])
def test_mean_loss_and_its_gradient_are_those_of_autograd(
    dtype: torch.dtype, tolerance: float, logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gqaprune.models.losses, "PIECE_LOGITS", logits)
    logits_BTV, labels = (torch.randn(2, 9, 300) * 3).to(dtype), torch.randint(0, 300, (2, 9))
    labels[1, 2:5] = IGNORED
    own_BTV, wide_BTV = logits_BTV.clone().requires_grad_(), logits_BTV.float().requires_grad_()
    expected = cross_entropy(wide_BTV[:, :-1].flatten(0, 1), labels[:, 1:].flatten())  # which ignores the same label
    loss = measure_mean_loss(own_BTV, labels)
    torch.testing.assert_close(loss, expected)
    (128 * loss).backward()
    (128 * expected).backward()
    assert own_BTV.grad is not None and wide_BTV.grad is not None and own_BTV.grad.dtype == dtype
    torch.testing.assert_close(own_BTV.grad.float(), wide_BTV.grad, rtol=tolerance, atol=1e-6)
    torch.testing.assert_close(measure_mean_loss(logits_BTV, labels), expected.detach())


def test_losses_of_a_model_are_those_of_its_logits(piece: int, any_variant: str) -> None:
    model, tokens = make_model(any_variant), make_tokens(2)
    labels = tokens.clone()
    labels[1, :9] = IGNORED
    sums, counts = measure_losses(model, tokens, labels)
    with torch.no_grad():
        expected, _ = sum_token_losses(model(tokens).logits, labels)
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)
    assert counts.tolist() == count_scored(labels).tolist() == [15, 7]


def test_a_batch_that_does_not_fit_is_halved_and_its_halves_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens, seen = make_model(), make_tokens(5), []
    labels = tokens.clone()
    labels[3, :9] = IGNORED
    expected = measure_losses(model, tokens, labels)

    def run(model: Any, ids_BT: Tensor) -> Tensor:
        seen.append(len(ids_BT))
        if len(ids_BT) > bound:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run_decoder(model, ids_BT)

    monkeypatch.setattr(gqaprune.models.losses, "run_decoder", run)
    bound = 2
    with pytest.warns(UserWarning, match=r"5 windows of 16 tokens .* data\.evaluation\.batch_size to 3"):
        sums, counts = measure_losses(model, tokens, labels)
    assert seen == [5, 3, 2, 1, 2]
    torch.testing.assert_close(sums, expected[0], rtol=1e-5, atol=1e-5)
    assert counts.equal(expected[1])
    bound = 0
    with pytest.raises(torch.OutOfMemoryError), pytest.warns(UserWarning):
        measure_losses(model, tokens, labels)


def test_gradients_of_a_model_are_those_of_its_logits(piece: int, any_variant: str) -> None:
    model, tokens = make_model(any_variant), make_tokens(2)
    labels = tokens.clone()
    labels[0, 3:6] = IGNORED
    embedded = model.get_input_embeddings()(tokens).detach()
    with freeze_parameters(model):

        def differentiate(by_pieces: bool) -> tuple[Tensor, Tensor]:
            inputs = embedded.clone().requires_grad_()
            handle = model.get_input_embeddings().register_forward_hook(lambda *_: inputs)
            if by_pieces:
                hidden = run_decoder(model, tokens)
                handle.remove()
                losses, gradient = differentiate_losses(model, hidden, labels)
                hidden.backward(gradient)
            else:
                sums, counts = sum_token_losses(model(tokens).logits, labels)
                handle.remove()
                losses = sums / counts
                losses.sum().backward()
            assert inputs.grad is not None
            return losses.detach(), inputs.grad

        for found, expected in zip(differentiate(True), differentiate(False), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_no_more_logits_than_a_piece_has_are_there_at_once(piece: int) -> None:
    model, tokens, seen = make_model("llama"), make_tokens(2), []
    model.lm_head.register_forward_hook(lambda _, __, logits: seen.append(logits.shape[1]))
    measure_losses(model, tokens, tokens)
    with freeze_parameters(model):
        differentiate_losses(model, run_decoder(model, tokens), tokens)
    assert max(seen) <= min(piece, 8) and sum(seen) == 2 * 15  # nor ever more than half of a window's


def test_losses_of_a_split_model_are_those_of_the_whole_one() -> None:
    tokens, whole, split = make_tokens(2), make_model("llama"), make_model("llama")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for module in (*split.model.layers, split):
            fully_shard(module, mesh=mesh)
        torch.testing.assert_close(measure_losses(split, tokens, tokens), measure_losses(whole, tokens, tokens))
    finally:
        torch.distributed.destroy_process_group()
