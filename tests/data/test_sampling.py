"""Sampled text follows the model's distribution, the prompts and the seed, and is read back from the cache."""

from pathlib import Path
from typing import Any

import pytest
import torch

import gqaprune.data.sampling
from gqaprune.data.sampling import _draw, sample_from_model

from tiny import make_model, make_tokenizer


def sample(variant: str = "llama", **settings: Any) -> torch.Tensor:
    return sample_from_model(
        make_model(variant), make_tokenizer(), **{"count": 3, "window": 12, "cache": None, **settings}
    )


def test_near_zero_temperature_gives_the_likeliest_continuation(any_variant: str) -> None:
    model = make_model(any_variant)
    windows = sample_from_model(
        model, make_tokenizer(), 2, 12, prompts=["ab", "xyz"], temperature=1e-4, batch_size=2, cache=None
    )
    assert windows.shape == (2, 12) and windows.dtype == torch.int64
    for row, prompt in zip(windows, ("ab", "xyz"), strict=True):
        start = torch.tensor(make_tokenizer()(prompt)["input_ids"])
        assert torch.equal(row[: len(start)], start)
        likeliest = model(row[None]).logits[0].argmax(-1)
        assert torch.equal(row[len(start) :], likeliest[len(start) - 1 : -1])


def test_models_that_recompute_activations_write_the_same() -> None:
    model = make_model()
    model.activation_checkpointing_enable()
    model.train()
    sampled = sample_from_model(model, make_tokenizer(), 3, 12, cache=None)
    assert torch.equal(sampled, sample())
    assert model.is_activation_checkpointing and all(module.training for module in model.modules())


def test_tokens_are_drawn_from_the_models_distribution() -> None:
    model = make_model()
    windows = sample_from_model(model, make_tokenizer(), 2000, 2, cache=None, batch_size=500, temperature=2.0)
    expected = (model(torch.tensor([[256]])).logits[0, -1] / 2).softmax(-1)
    found = torch.bincount(windows[:, 1], minlength=260) / 2000
    assert (windows[:, 0] == 256).all()  # the beginning-of-text token
    assert (found - expected).abs().sum() < 0.35  # 0.25 ± 0.02 for 2000 draws; another distribution gives 1 or more


@pytest.mark.parametrize("vocabulary", [5, 256, 1000])
def test_a_draw_inverts_the_cumulated_probabilities(vocabulary: int) -> None:
    logits_BV = 3 * torch.randn(500, vocabulary, generator=torch.Generator().manual_seed(1))
    logits_BV[:, ::3] = -torch.inf
    drawn_B = _draw(logits_BV, 1.0, torch.Generator().manual_seed(2))
    random_B1 = torch.rand(500, generator=torch.Generator().manual_seed(2), dtype=torch.float64)[:, None]
    sums_BV = logits_BV.softmax(-1).double().cumsum(-1)
    assert torch.equal(drawn_B, torch.searchsorted(sums_BV, random_B1 * sums_BV[:, -1:], right=True)[:, 0])
    assert (drawn_B % 3 > 0).all()


def test_top_p_leaves_out_the_unlikely() -> None:
    model = make_model()
    windows = sample_from_model(model, make_tokenizer(), 500, 2, cache=None, batch_size=500, top_p=0.5)
    probabilities, order = model(torch.tensor([[256]])).logits[0, -1].softmax(-1).sort(descending=True)
    nucleus = order[: int((probabilities.cumsum(0) < 0.5).sum()) + 1]
    assert set(windows[:, 1].tolist()) == set(nucleus.tolist())


def test_windows_are_packed_from_documents() -> None:
    windows = sample(count=3, window=10, document=4, prompts=["a", "b"])
    documents = windows.flatten()[:28].view(7, 4)
    starts = [make_tokenizer()(prompt)["input_ids"][0] for prompt in ("a", "b")]
    assert documents[:, 0].tolist() == [starts[index % 2] for index in range(7)]
    alone = sample(count=8, window=4, document=4, prompts=["a", "b"])
    assert torch.equal(windows.flatten(), alone.flatten()[:30])


def test_one_bar_goes_over_all_batches(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="gqaprune"):
        sample(count=5, window=4, batch_size=2)
    (said,) = [text for text in caplog.messages if "sampling text" in text]
    assert "sampling text from the model: 9 steps in" in said  # three batches of three tokens after the first


def test_seed_decides() -> None:
    assert torch.equal(sample(seed=1), sample(seed=1))
    assert not torch.equal(sample(seed=1), sample(seed=2))


def test_second_time_reads_the_cache_and_another_model_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = sample(cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr("gqaprune.data.sampling._sample", None)  # sampling again would fail
        assert torch.equal(sample(cache=tmp_path), first)
    sample("qwen2", cache=tmp_path)
    sample(cache=tmp_path, seed=1)
    assert len(list(tmp_path.iterdir())) == 3


def test_killed_sampling_goes_on_at_its_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"count": 4, "window": 12, "batch_size": 1}
    sampled, count = gqaprune.data.sampling._sample, 0

    def stop_at_the_third(*arguments: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 3:
            raise KeyboardInterrupt
        return sampled(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("gqaprune.data.sampling._sample", stop_at_the_third)
        with pytest.raises(KeyboardInterrupt):
            sample(cache=tmp_path, **settings)
        assert torch.equal(sample(cache=tmp_path, **settings), sample(**settings))
    assert count == 3 + 2 + 4  # the killed run's, what it left, and all without a cache


def test_batches_are_sampled_from_seeds_of_their_own() -> None:
    windows = sample(count=4, batch_size=2, seed=1).tolist()
    more = sample(count=6, batch_size=2, seed=1).tolist()
    other = sample(count=4, batch_size=2, seed=2).tolist()
    assert more[:4] == windows
    assert len({str(window) for window in more + other}) == 10


def test_broken_cache_file_is_sampled_again(tmp_path: Path) -> None:
    first = sample(cache=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"broken")
    assert torch.equal(sample(cache=tmp_path), first)


def test_cache_that_cannot_be_written_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert torch.equal(sample(cache=tmp_path / "file" / "samples"), sample())


def test_model_is_left_as_it_was() -> None:
    model = make_model().train()
    sample_from_model(model, make_tokenizer(), 1, 4, cache=None)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 0}, "count >= 1"),
        ({"window": 1}, "window >= 2"),
        ({"document": 1}, "document >= 2, got 1"),
        ({"temperature": 0.0}, "temperature > 0"),
        ({"top_p": 1.5}, "top_p <= 1"),
        ({"prompts": ["a" * 12]}, "has 12 tokens, but a document of 12"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(**settings)


def test_overflow_stops_with_its_place() -> None:
    model = make_model()
    with torch.no_grad():
        model.model.norm.weight.mul_(float("inf"))
    with pytest.raises(ValueError, match="not finite at token 0.*bfloat16 or float32"):
        sample_from_model(model, make_tokenizer(), 1, 4, cache=None)


def test_documents_longer_than_the_context_are_refused() -> None:
    model = make_model()
    with pytest.raises(ValueError, match="document is 300 tokens, the model's context 256: set it to 256 or less"):
        sample_from_model(model, make_tokenizer(), 1, 512, document=300, cache=None)


def test_every_window_begins_with_bos_where_documents_do_not_fill_it_evenly() -> None:
    windows = sample(count=3, window=10, document=4, prompts=["a", "b"], bos=True)
    assert windows.shape == (3, 10)
    start = [[256, *make_tokenizer()(prompt)["input_ids"]] for prompt in ("a", "b")]
    # Three documents a window, the third of them cut off.
    assert [row[place : place + 2].tolist() for row in windows for place in (0, 4, 8)] == [
        start[index % 2] for index in range(9)
    ]
