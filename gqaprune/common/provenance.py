"""Record where a result comes from: the command line and the versions of packages."""

import platform
import sys
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("gqaprune", "torch", "lightning", "transformers")


def get_command() -> list[str]:
    """Return the command line of this process, if it is gqaprune's."""
    program = Path(sys.argv[0]).name
    return [program, *sys.argv[1:]] if program in ("gqaprune", "cli.py") else []


def get_versions() -> dict[str, str]:
    """Return name -> version of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}
