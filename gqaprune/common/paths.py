"""Expand paths as people type them."""

import os


def expand_path(text: str) -> str:
    """Expand `~` and environment variables such as `$NAME` in a path, like a shell."""
    return os.path.expanduser(os.path.expandvars(text)) if text.startswith("~") or "$" in text else text
