"""A module that is held without being registered is no submodule."""

from torch import nn

from gqaprune.common.unregistered import Unregistered


def test_a_wrapped_module_is_neither_moved_nor_trained_nor_saved_with_its_holder() -> None:
    holder, held = nn.Module(), nn.Linear(2, 3)
    holder.held = Unregistered(held)  # type: ignore[assignment]
    assert holder.held.module is held
    assert not list(holder.parameters()) and not list(holder.children()) and not holder.state_dict()
