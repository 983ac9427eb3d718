"""Cut a model to a plan and repair the remaining weights.

May import placement and the packages below it. `cut.py` changes shapes. `repair.py` refits output projections by least
squares and `refinement.py` trains MLPs, layer by layer; `distillation.py` then trains the whole decoder. `removal.py`
predicts the error that a refit leaves.
"""

from typing import NoReturn

from gqaprune.common.renamed import refuse_moved_name


def __getattr__(name: str) -> NoReturn:
    """Raise an error that says where the contents of the former module `surgery` are now."""
    refuse_moved_name("surgery", name)
