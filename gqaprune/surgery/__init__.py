"""Cut weights as a plan says, and repair what is left: least squares, then refinement, layer by layer.

May import placement and what stands below it. `cut.py` changes shapes, `repair.py` refits, `refinement.py` trains
MLPs, `distillation.py` the whole decoder last; `removal.py` says beforehand what a refit cannot make up for.
"""

from typing import NoReturn

from gqaprune.common.renamed import refuse_moved_name


def __getattr__(name: str) -> NoReturn:
    """Name the place of what once was in a module of this name."""
    refuse_moved_name("surgery", name)
