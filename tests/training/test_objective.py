"""The loss of training is what its settings say, and its teacher is loaded, cached and kept apart."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

import gqaprune
from gqaprune.models.architecture import get_layers
from gqaprune.models.layerwise import embed_batches
from gqaprune.placement.model_source import ModelSource
from gqaprune.surgery.cut import apply_plan
from gqaprune.training.compilation import LayerCompiler
from gqaprune.training.lora import add_adapters
from gqaprune.training.objective import Objective
from gqaprune.training.recovery import RecoveryConfig
from gqaprune.training.teacher import cache_teacher

from cuts import UNEVEN, make_plan
from tiny import VOCABULARY, make_model, make_tokenizer, make_tokens

IDS = make_tokens(3, 12)
BATCH = {"input_ids": IDS, "labels": IDS, "index": torch.arange(3)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """A model to learn from, unlike the student."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    gqaprune.save(make_model("llama", seed=1), make_tokenizer(), folder)
    return ModelSource(str(folder), "float32")


def make_objective(source: ModelSource | None, **settings: Any) -> Objective:
    objective = Objective(RecoveryConfig(**settings))
    if source is not None:
        objective.load_teacher(source)
    return objective


def compute_language_loss(logits: Tensor) -> Tensor:
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())


def compute_divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Hinton's: the square of the temperature times the divergence, mean over tokens."""
    scaled = [torch.log_softmax(logits[:, :-1] / temperature, -1) for logits in (student, teacher)]
    return temperature**2 * functional.kl_div(*scaled, log_target=True, reduction="none").sum(-1).mean()


def run(model: PreTrainedModel) -> Any:
    return model(input_ids=IDS)


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_without_distillation_the_loss_is_the_language_models_and_has_no_parts(mode: str) -> None:
    student = make_model("llama")
    loss, parts = make_objective(None, mode=mode).measure(student, BATCH)
    torch.testing.assert_close(loss, compute_language_loss(run(student).logits))
    assert parts == {}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_distillation_mixes_loss_and_divergence_by_weight(
    source: ModelSource, weight: float, temperature: float
) -> None:
    student = make_model("llama")
    objective = make_objective(source, mode="distill", distill_weight=weight, temperature=temperature)
    loss, parts = objective.measure(student, BATCH)
    logits, taught = run(student).logits, run(source.load()).logits
    expected = {
        "lm_loss": compute_language_loss(logits),
        "divergence": compute_divergence(logits, taught, temperature),
    }
    torch.testing.assert_close(parts, expected)
    mixture = (1 - weight) * expected["lm_loss"] + weight * expected["divergence"]
    torch.testing.assert_close(loss, mixture)
    parameters = list(student.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    torch.testing.assert_close(gradients, torch.autograd.grad(mixture, parameters), rtol=1e-4, atol=1e-6)


def walk(model: PreTrainedModel) -> list[Tensor]:
    """What each decoder layer gives, one called after the other by hand: before the final norm."""
    (stream,) = embed_batches(model, [IDS])
    outputs = []
    for layer, arguments in zip(get_layers(model), stream.arguments, strict=True):
        found = layer(outputs[-1] if outputs else stream.hidden_BTD, **arguments)
        outputs.append(found[0] if isinstance(found, tuple) else found)
    return outputs


def compute_distance(own: list[Tensor], taught: list[Tensor]) -> Tensor:
    pairs = zip(own, taught, strict=True)
    distances = [((one - other).square().sum(-1) / other.square().sum(-1)).mean() for one, other in pairs]
    return torch.stack(distances).mean()


@pytest.mark.parametrize("layers", [None, [0], [0, 2], [2, 1]], ids=str)
def test_distance_of_hidden_states_is_added_with_its_weight(source: ModelSource, layers: list[int] | None) -> None:
    student = make_model("llama")
    objective = make_objective(source, mode="distill", hidden_weight=0.7, hidden_layers=layers)
    loss, parts = objective.measure(student, BATCH)
    own, taught = ([walk(model)[i] for i in layers or [2]] for model in (student, source.load()))
    assert list(parts) == ["lm_loss", "divergence", "hidden_distance"]
    torch.testing.assert_close(parts["hidden_distance"], compute_distance(own, taught))
    torch.testing.assert_close(loss, parts["divergence"] + 0.7 * parts["hidden_distance"])


def recompute(student: PreTrainedModel) -> None:
    student.activation_checkpointing_enable()
    student.train()


def adapt(student: PreTrainedModel) -> None:
    add_adapters(student, RecoveryConfig("lora+distill", lora_rank=2))


@pytest.mark.parametrize(
    ("prepare", "pruned"),
    [(None, False), (recompute, False), (adapt, False), (recompute, True), (None, True)],
    ids=["whole", "recomputed", "lora", "per-layer recomputed", "per-layer"],
)
@pytest.mark.parametrize("variant", ["llama", "gemma3"])
def test_hidden_states_are_those_before_the_final_norm_with_their_gradients_however_layers_run(
    prepare: Callable[[PreTrainedModel], None] | None, pruned: bool, variant: str
) -> None:
    student, teacher = make_model(variant, kv_heads=3, ratio=2), make_model(variant, kv_heads=3, ratio=2, seed=1)
    if pruned:
        apply_plan(student, make_plan(student, *UNEVEN))
    if prepare is not None:
        prepare(student)
    objective = make_objective(None, mode="distill", hidden_weight=1.0, hidden_layers=[1, 2], distill_weight=1.0)
    objective.teacher = teacher
    _, parts = objective.measure(student, BATCH)
    assert all(layer._compiled_call_impl is None for layer in get_layers(student))
    # `walk` begins behind the embedding.
    parameters = [p for name, p in student.named_parameters() if p.requires_grad and "layers" in name]
    gradients = torch.autograd.grad(parts["hidden_distance"], parameters, allow_unused=True)
    student.eval()
    expected = compute_distance(walk(student)[1:], walk(teacher)[1:])
    torch.testing.assert_close(parts["hidden_distance"], expected)
    for found, wanted in zip(gradients, torch.autograd.grad(expected, parameters, allow_unused=True), strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_hidden_states_of_compiled_layers_are_taken_in_every_step(
    source: ModelSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.compile", partial(torch.compile, backend="eager"))
    student, compiler = make_model("llama"), LayerCompiler(True)
    objective = make_objective(source, mode="distill", hidden_weight=1.0)
    for _ in range(2):
        with compiler.compiled(student):
            _, parts = objective.measure(student, BATCH)
        expected = compute_distance([walk(student)[2]], [walk(source.load())[2]])
        torch.testing.assert_close(parts["hidden_distance"], expected)
        with torch.no_grad():
            student.model.layers[1].mlp.down_proj.weight.mul_(1.5)


def test_imbalance_of_experts_counts_in_the_language_loss() -> None:
    student = make_model("mixtral")
    plain, _ = make_objective(None).measure(student, BATCH)
    student.config.output_router_logits = True
    loss, _ = make_objective(None).measure(student, BATCH)
    imbalance = student(input_ids=IDS).aux_loss
    torch.testing.assert_close(loss, plain + student.config.router_aux_loss_coef * imbalance)
    assert loss > plain


def test_predictions_on_disk_stand_for_the_teacher_which_is_let_go(
    source: ModelSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gqaprune.training.objective.cache_teacher", partial(cache_teacher, cache=tmp_path))
    student = make_model("llama")
    live, _ = make_objective(source, mode="distill", temperature=2.0).measure(student, BATCH)
    objective = make_objective(source, mode="distill", temperature=2.0, teacher_top_k=VOCABULARY)
    windows = torch.cat([make_tokens(2, 12, seed=5), IDS])
    objective.cache_teacher(windows, 2, torch.device("cpu"))
    assert objective.teacher is None and not objective.lacks_teacher
    cached, _ = objective.measure(student, BATCH | {"index": torch.tensor([2, 3, 4])})
    torch.testing.assert_close(cached, live, rtol=1e-2, atol=0)  # float16 on disk


def test_a_teacher_is_asked_for_once_and_only_to_distill(source: ModelSource) -> None:
    assert not Objective(RecoveryConfig("lora")).lacks_teacher
    objective = Objective(RecoveryConfig("lora+distill"))
    assert objective.lacks_teacher
    objective.load_teacher(source)
    assert not objective.lacks_teacher


def test_the_teacher_is_frozen_and_hidden_from_a_module_that_holds_the_objective(source: ModelSource) -> None:
    module = nn.Module()
    module.objective = make_objective(source, mode="distill")  # type: ignore[assignment]
    teacher = module.objective.teacher
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert not list(module.parameters()) and not module.state_dict()
