"""The `gqaprune` command: what can be typed, its checks, and the runs of it.

May import everything; nothing imports it. `overview.py` names the commands, `lightning_cli.py` has those that need a
trainer and `arguments.py` the others; `run.py` runs one.
"""

import sys

from gqaprune.cli.overview import describe_commands
from gqaprune.version import __version__


def main() -> int:
    """Run the command line. Returns the exit code."""
    if sys.argv[1:] == ["--version"]:
        print(f"gqaprune {__version__}")
        return 0
    if sys.argv[1:] in ([], ["--help"], ["-h"]):
        print(describe_commands())
        return 0
    from gqaprune.cli.run import run_command  # which imports torch and more: seconds

    return run_command()
