"""Sensitivity: what taking layers and blocks out of the model by hand gives; saved, reused, refused elsewhere."""

import copy
import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import gqaprune.scoring.sensitivity as sensitivity_module
from gqaprune.data.calibration import CalibrationSet
from gqaprune.models.architecture import find_blocks, get_layers, read_geometry
from gqaprune.models.losses import sum_token_losses
from gqaprune.placement.model_hash import hash_model, hash_tensors
from gqaprune.plan import BlockKey
from gqaprune.scoring.sensitivity import SENSITIVITIES, Origin, Sensitivity, measure_sensitivity

from tiny import WHOLE_MLP, make_model, make_tokens

BATCHES = [make_tokens(2, 16), make_tokens(1, 16, seed=1)]


def measure_loss(model: PreTrainedModel) -> float:
    """Mean loss per token over all batches."""
    losses = [sum_token_losses(model(input_ids=batch).logits, batch) for batch in BATCHES]
    return float(sum(loss.sum() for loss, _ in losses) / sum(tokens.sum() for _, tokens in losses))


def run_whole(model: PreTrainedModel) -> list[Tensor]:
    """Input of every layer and output of the last, all tokens of all batches joined: `[tokens, width]` each."""
    states: list[list[Tensor]] = []
    for batch in BATCHES:
        seen: list[Tensor] = []
        layers = get_layers(model)
        hooks = [layer.register_forward_pre_hook(lambda _, x, seen=seen: seen.append(x[0])) for layer in layers]
        hooks.append(layers[-1].register_forward_hook(lambda _, __, y, seen=seen: seen.append(y)))
        model(input_ids=batch)
        for hook in hooks:
            hook.remove()
        states.append(seen)
    return [torch.cat([state.flatten(0, 1) for state in layer]) for layer in zip(*states, strict=True)]


class Skip(nn.Module):
    """A decoder layer that does nothing."""

    def forward(self, hidden: Tensor, **_: object) -> Tensor:
        return hidden


@torch.no_grad()
def test_removal_is_the_loss_without_the_layer(any_variant: str) -> None:
    model = make_model(any_variant)
    found = SENSITIVITIES["removal"](model, find_blocks(model), BATCHES)
    dense = measure_loss(model)
    for layer in range(3):
        without = copy.deepcopy(model)
        get_layers(without)[layer] = Skip()
        expected = pytest.approx(measure_loss(without) - dense, abs=1e-5)
        assert all(value == expected for key, value in found.items() if key.layer == layer)
    assert len(set(found.values())) == 3


@torch.no_grad()
def test_block_removal_is_the_loss_with_the_blocks_output_projection_at_zero(any_variant: str) -> None:
    model = make_model(any_variant)
    found = SENSITIVITIES["block_removal"](model, find_blocks(model), BATCHES)
    dense = measure_loss(model)
    for index, block in enumerate(find_blocks(model)):
        without = copy.deepcopy(model)
        for parameter in find_blocks(without)[index].output.parameters():  # the bias, too
            parameter.zero_()
        assert found[block.key] == pytest.approx(measure_loss(without) - dense, abs=1e-5)
    assert len(set(found.values())) == len(found) == len(find_blocks(model))


@torch.no_grad()
def test_block_influence_is_one_minus_the_cosine_of_input_and_output(any_variant: str) -> None:
    model = make_model(any_variant)
    found = SENSITIVITIES["block_influence"](model, find_blocks(model), BATCHES)
    states = run_whole(model)
    for layer, (before, after) in enumerate(pairwise(states)):
        cosine = (before * after).sum(-1) / (before.norm(dim=-1) * after.norm(dim=-1))
        assert found[BlockKey(layer, "attention")] == pytest.approx(float(1 - cosine.mean()), abs=1e-5)
        assert all(value == found[BlockKey(layer, "attention")] for key, value in found.items() if key.layer == layer)


@torch.no_grad()
def test_activation_is_the_norm_of_what_a_block_adds_to_what_it_adds_to(any_variant: str) -> None:
    model = make_model(any_variant)
    found = SENSITIVITIES["activation"](model, find_blocks(model), BATCHES)
    for index, layer in enumerate(get_layers(model)):
        names = ("pre_feedforward_layernorm", "post_attention_layernorm")
        if any_variant in ("olmo2", "olmo3", "exaone4"):  # no norm before the MLP
            names = ("mlp",)
        before_mlp = next(getattr(layer, name) for name in names if hasattr(layer, name))
        seen: dict[str, list[Tensor]] = {"in": [], "middle": [], "out": []}
        hooks = [
            layer.register_forward_pre_hook(lambda _, x, seen=seen: seen["in"].append(x[0])),
            before_mlp.register_forward_pre_hook(lambda _, x, seen=seen: seen["middle"].append(x[0])),
            layer.register_forward_hook(lambda _, __, y, seen=seen: seen["out"].append(y)),
        ]
        for batch in BATCHES:
            model(input_ids=batch)
        for hook in hooks:
            hook.remove()
        seen |= {
            "attention": [middle - x for x, middle in zip(seen["in"], seen["middle"], strict=True)],
            "mlp": [y - middle for y, middle in zip(seen["out"], seen["middle"], strict=True)],
        }
        norms = {name: torch.cat([x.norm(dim=-1).flatten() for x in values]) for name, values in seen.items()}
        attention = float((norms["attention"] / norms["in"]).mean())
        assert found[BlockKey(index, "attention")] == pytest.approx(attention, rel=1e-4)
        if any_variant not in WHOLE_MLP:
            mlp = float((norms["mlp"] / norms["middle"]).mean())
            assert found[BlockKey(index, "mlp")] == pytest.approx(mlp, rel=1e-4)


@pytest.mark.parametrize("method", SENSITIVITIES)
def test_measuring_some_blocks_gives_what_measuring_all_gives_and_leaves_the_model_alone(method: str) -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    blocks = find_blocks(model)
    whole, some = SENSITIVITIES[method](model, blocks, BATCHES), SENSITIVITIES[method](model, blocks[2:4], BATCHES)
    assert some == {block.key: whole[block.key] for block in blocks[2:4]}
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.eval()
    assert measure_loss(model) == measure_loss(make_model())


def test_longer_batches_weigh_more() -> None:
    model = make_model()
    short, long = make_tokens(1, 8), make_tokens(3, 8, seed=1)
    blocks = find_blocks(model)
    parts = [SENSITIVITIES["removal"](model, blocks, [batch]) for batch in (short, long)]
    both = SENSITIVITIES["removal"](model, blocks, [short, long])
    for key, value in both.items():
        assert value == pytest.approx((parts[0][key] + 3 * parts[1][key]) / 4, rel=1e-6)


@pytest.mark.parametrize("method", ["removal", "block_removal"])
def test_dense_loss_that_is_not_finite_is_refused_with_its_batch(method: str) -> None:
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.inf)
    with pytest.raises(ValueError, match="the loss of the dense model on calibration batch 0 is not finite"):
        SENSITIVITIES[method](model, find_blocks(model), BATCHES)


def test_measure_that_is_not_finite_is_refused_with_its_block() -> None:
    model = make_model()
    with torch.no_grad():
        get_layers(model)[1].mlp.down_proj.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="layer 1 mlp on calibration batch 0 is not finite"):
        SENSITIVITIES["activation"](model, find_blocks(model)[3:4], BATCHES)


def test_no_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one calibration batch"):
        SENSITIVITIES["removal"](make_model(), find_blocks(make_model()), [])


def test_saved_sensitivity_is_measured_once_and_read_back_equal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = make_model(), tmp_path / "new" / "importance.json"
    blocks = find_blocks(model)

    def measure() -> Sensitivity:
        return measure_sensitivity(
            model, blocks, CalibrationSet(BATCHES, source="tiny", seed=3, corpora=("embedded",)), "removal", path
        )

    first = measure()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    monkeypatch.setattr(sensitivity_module, "SENSITIVITIES", {})  # measuring again would fail
    assert measure() == first == Sensitivity.load(path)
    hashes = hash_model(model), hash_tensors(BATCHES)
    assert first.origin == Origin("removal", "tiny", read_geometry(model.config), ("embedded",), 3, 16, 3, *hashes)
    assert first.importance.keys() == {block.key for block in blocks}


def test_other_weights_or_text_of_the_same_names_are_refused(tmp_path: Path) -> None:
    path, batches = tmp_path / "importance.json", [*BATCHES[1:], BATCHES[0]]
    model, other = make_model(), make_model(seed=1)
    measure_sensitivity(model, find_blocks(model), CalibrationSet(BATCHES), "activation", path)
    for own, text, what in ((other, BATCHES, "weights"), (model, batches, "text")):
        with pytest.raises(ValueError, match=f"of another run: {what} '"):
            measure_sensitivity(own, find_blocks(own), CalibrationSet(text), "activation", path)
    data = json.loads(path.read_text())
    del data["weights"]  # as earlier versions wrote it
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="weights 'None'"):
        measure_sensitivity(model, find_blocks(model), CalibrationSet(BATCHES), "activation", path)


def test_path_that_cannot_be_written_is_refused_before_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(sensitivity_module, "SENSITIVITIES", {})  # measuring would fail
    with pytest.raises(ValueError, match="file is a file"):
        measure_sensitivity(make_model(), [], CalibrationSet(BATCHES), "removal", tmp_path / "file" / "importance.json")


CHANGES = {
    "method": ("activation", "method 'removal' against 'activation'"),
    "corpora": (("c4",), r"corpora \('embedded',\) against \('c4',\)"),
    "windows": (9, "windows 3 against 9"),
    "window": (32, "window 16 against 32"),
    "seed": (4, "seed 3 against 4"),
    "weights": ("ef", "weights 'ab' against 'ef'"),
    "text": ("ef", "text 'cd' against 'ef'"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_sensitivity_of_another_run_is_refused_with_the_difference(name: str) -> None:
    origin = Origin("removal", "tiny", read_geometry(make_model().config), ("embedded",), 3, 16, 3, "ab", "cd")
    value, message = CHANGES[name]
    with pytest.raises(ValueError, match=message):
        Sensitivity(origin, {}).check_fits(replace(origin, **{name: value}), [])


def test_sensitivity_of_the_same_weights_under_another_name_is_taken() -> None:
    origin = Origin("removal", "/there/tiny", read_geometry(make_model().config), (), 3, 16, 3, "ab", "cd")
    Sensitivity(origin, {}).check_fits(replace(origin, model="/here/tiny"), [])


def test_sensitivity_of_another_geometry_or_of_too_few_blocks_is_refused() -> None:
    model = make_model()
    origin = Origin("removal", "tiny", read_geometry(model.config), (), 3, 16, 3, "ab", "cd")
    other = replace(origin, geometry=read_geometry(make_model(channels=24).config))
    with pytest.raises(ValueError, match="layer 0 channels 20 against 24"):
        Sensitivity(origin, {}).check_fits(other, [])
    blocks = find_blocks(model)
    with pytest.raises(ValueError, match="lacks layer 0 mlp"):
        Sensitivity(origin, {blocks[0].key: 1.0}).check_fits(origin, blocks)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("[]", "not a sensitivity of format"),
        ('{"format": "gqaprune-plan/1"}', "found 'gqaprune-plan/1'"),
        ('{"format": "gqaprune-sensitivity/1"}', "'method'"),
    ],
)
def test_file_that_is_no_sensitivity_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        Sensitivity.load(path)


def test_missing_file_and_unknown_block_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no sensitivity at "):
        Sensitivity.load(tmp_path / "none.json")
    origin = Origin("removal", "tiny", read_geometry(make_model().config), (), 3, 16, 3, "ab", "cd")
    path = tmp_path / "file.json"
    Sensitivity(origin, {BlockKey(0, "mlp"): 1.0}).save(path)
    data = json.loads(path.read_text())
    data["importance"][0]["kind"] = "embedding"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match="attention or mlp"):
        Sensitivity.load(path)
