"""Commands that need no trainer, each a function with the command's arguments, and the work of `search` and `sweep`.

May import pipeline, checkpoints and the packages below them, but no Lightning. To add a command, write its function
and add it to `TOOLS` in `cli/arguments.py` and to `DESCRIPTIONS` in `cli/overview.py`.
"""
