"""Random numbers of a step follow from the run's seed and its place, and from nothing drawn before."""

import torch

from gqaprune.training.seeding import seed_by_place


def draw(*place: int) -> torch.Tensor:
    with seed_by_place(torch.device("cpu"), *place):
        return torch.rand(4)


def test_a_place_has_the_same_numbers_whatever_was_drawn_before() -> None:
    first = draw(0, 3, 1)
    torch.rand(7)
    assert torch.equal(draw(0, 3, 1), first)


def test_other_places_and_other_seeds_have_other_numbers() -> None:
    first = draw(0, 3, 1)
    assert not torch.equal(draw(0, 4, 1), first) and not torch.equal(draw(3, 0, 1), first)
    torch.manual_seed(1)
    assert not torch.equal(draw(0, 3, 1), first)


def test_numbers_after_the_step_are_as_if_it_had_drawn_none() -> None:
    torch.manual_seed(0)
    expected = torch.rand(4)
    torch.manual_seed(0)
    draw(0, 3, 1)
    assert torch.equal(torch.rand(4), expected)
