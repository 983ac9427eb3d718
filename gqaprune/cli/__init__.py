"""The `gqaprune` command: its arguments, their checks, and running it.

May import everything; nothing imports it. `overview.py` lists the commands, `lightning_cli.py` has those that need a
trainer and `arguments.py` the others; `run.py` runs one.
"""

import sys

from gqaprune.cli.overview import describe_commands
from gqaprune.version import __version__


def main() -> int:
    """Run the command line and return the exit code."""
    if sys.argv[1:] == ["--version"]:
        print(f"gqaprune {__version__}")
        return 0
    if sys.argv[1:] in ([], ["--help"], ["-h"]):
        print(describe_commands())
        return 0
    from gqaprune.cli.run import run_command  # takes seconds, because it imports torch and more

    return run_command()
