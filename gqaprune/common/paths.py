"""Paths as people type them."""

import os


def expand_path(text: str) -> str:
    """A path with the home folder for `~` and the values of environment variables for `$NAME`, as shells have it."""
    return os.path.expanduser(os.path.expandvars(text)) if text.startswith("~") or "$" in text else text
