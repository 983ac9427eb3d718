"""The gate identity, gradients per sample, and gates that leave no trace."""

import pytest
import torch
from torch.nn import functional

from gqaprune.models.architecture import find_blocks
from gqaprune.models.gates import apply_gates, compute_gate_gradients, freeze_parameters

from tiny import make_model, make_tokens


def test_gate_gradient_is_the_summed_taylor_term_of_the_units_columns(any_variant: str) -> None:
    model, tokens = make_model(any_variant, ratio=2), make_tokens(1)
    blocks = find_blocks(model)
    with freeze_parameters(model):
        gradients, _ = compute_gate_gradients(model, blocks, tokens)

    model(tokens, labels=tokens).loss.backward()
    for block in blocks:
        weight = block.output.weight
        taylor = (weight * weight.grad).sum(0).view(block.units, block.columns_per_unit).sum(1)
        torch.testing.assert_close(gradients[block.key][0], taylor, atol=1e-6, rtol=1e-4)


def test_gate_gradient_is_the_derivative_of_the_loss_by_the_gate() -> None:
    model, tokens = make_model("llama").double(), make_tokens(1)
    blocks = find_blocks(model)
    with freeze_parameters(model):
        gradients, _ = compute_gate_gradients(model, blocks, tokens)
    block, unit, step = blocks[2], 1, 1e-2

    def loss_at(value: float) -> float:
        gate = torch.ones(1, block.units, dtype=torch.float64)
        gate[0, unit] = value
        with torch.no_grad(), apply_gates(blocks, {block.key: gate}):
            return float(model(tokens, labels=tokens).loss)

    slope = (loss_at(1 + step) - loss_at(1 - step)) / (2 * step)
    assert float(gradients[block.key][0, unit]) == pytest.approx(slope, rel=1e-2)


def test_samples_of_a_batch_have_the_gradients_they_have_alone() -> None:
    model, tokens = make_model("qwen3"), make_tokens(3)
    blocks = find_blocks(model)
    with freeze_parameters(model):
        together, losses = compute_gate_gradients(model, blocks, tokens)
        for sample in range(3):
            alone, loss = compute_gate_gradients(model, blocks, tokens[sample : sample + 1])
            torch.testing.assert_close(losses[sample], loss[0])
            for key, gradient in alone.items():
                torch.testing.assert_close(together[key][sample], gradient[0], atol=1e-6, rtol=1e-4)


def test_losses_are_mean_nats_per_token() -> None:
    model, tokens = make_model("llama"), make_tokens(1)
    with freeze_parameters(model):
        _, losses = compute_gate_gradients(model, find_blocks(model), tokens)
        logits = model(tokens).logits[0, :-1]
    assert float(losses) == pytest.approx(float(functional.cross_entropy(logits, tokens[0, 1:])), rel=1e-5)


def test_gradients_are_the_same_where_activations_are_recomputed_and_dropout_stays_off() -> None:
    model, tokens, calls = make_model("mistral"), make_tokens(), []
    blocks = find_blocks(model)
    model.train()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
        layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    with freeze_parameters(model):
        plain, _ = compute_gate_gradients(model, blocks, tokens)
    assert len(calls) == 3
    model.activation_checkpointing_enable()
    with freeze_parameters(model):
        recomputed, _ = compute_gate_gradients(model, blocks, tokens)
    assert len(calls) == 3 * 3
    assert all(module.training for module in model.modules())
    for key, gradient in plain.items():
        torch.testing.assert_close(recomputed[key], gradient)


def test_bfloat16_models_give_float32_gradients() -> None:
    model = make_model("llama").bfloat16()
    with freeze_parameters(model):
        gradients, _ = compute_gate_gradients(model, find_blocks(model), make_tokens())
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}


def test_open_gates_change_no_logit_and_hooks_are_gone_afterwards() -> None:
    model, tokens = make_model("llama"), make_tokens()
    blocks = find_blocks(model)
    before = model(tokens).logits
    with apply_gates(blocks, {block.key: torch.ones(1, block.units) for block in blocks}):
        assert torch.equal(model(tokens).logits, before)
    assert all(not block.output._forward_pre_hooks for block in blocks)


def test_freezing_restores_mode_and_gradient_flags_after_an_error() -> None:
    model = make_model("llama").train()
    model.model.norm.weight.requires_grad_(False)
    with pytest.raises(RuntimeError), freeze_parameters(model):
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        raise RuntimeError
    assert model.training
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.norm.weight"]
