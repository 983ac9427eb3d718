"""Commands that need no trainer, each a function whose arguments are the command's, and what `search` and `sweep` try.

May import pipeline and checkpoints and what stands below them, but no Lightning. To add a command, write its function
and enter it in `TOOLS` and `DESCRIPTIONS` of `cli.py`.
"""
