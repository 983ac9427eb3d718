import torch

from gqaprune.models.architecture import get_layers
from gqaprune.models.layerwise import embed_batches, record_layer_inputs, resume_at, run_layer, watch_inputs

from tiny import make_model, make_tokens


def test_walking_the_layers_gives_the_models_own_hidden_states(any_variant: str) -> None:
    model, batches = make_model(any_variant), [make_tokens(2, 16), make_tokens(1, 12, seed=1)]
    for stream, batch in zip(embed_batches(model, batches), batches, strict=True):
        for index in range(len(get_layers(model))):
            stream.hidden_BTD = run_layer(model, index, stream)
        torch.testing.assert_close(model.model.norm(stream.hidden_BTD), model.model(batch).last_hidden_state)


def test_watched_inputs_are_those_of_the_whole_model_and_end_with_the_context() -> None:
    model, batch = make_model(), make_tokens(2, 8)
    projection = model.model.layers[1].mlp.down_proj
    seen: list[tuple[str, torch.Tensor]] = []
    (stream,) = embed_batches(model, [batch])
    stream.hidden_BTD = run_layer(model, 0, stream)
    with watch_inputs({"down": projection}, lambda name, x_NC: seen.append((name, x_NC))):
        run_layer(model, 1, stream)
        model(batch)
    model(batch)
    (first, walked_NC), (second, whole_NC) = seen
    assert first == second == "down" and walked_NC.shape == (16, 20)
    torch.testing.assert_close(walked_NC, whole_NC)


def test_embedding_leaves_the_layers_as_they_were() -> None:
    model, batch = make_model(), make_tokens(1, 8)
    before = model(batch).logits
    embed_batches(model, [batch])
    assert all("forward" not in vars(layer) for layer in get_layers(model))
    torch.testing.assert_close(model(batch).logits, before)


def test_resuming_at_any_layer_with_its_input_gives_the_models_own_logits(any_variant: str) -> None:
    model, batch = make_model(any_variant), make_tokens(2, 16)
    expected = model(batch).logits
    inputs = record_layer_inputs(model, batch)
    assert len(inputs) == len(get_layers(model)) + 1
    for index, hidden in enumerate(inputs):
        with resume_at(model, index, hidden):
            torch.testing.assert_close(model(batch).logits, expected)
    torch.testing.assert_close(model(batch).logits, expected)
