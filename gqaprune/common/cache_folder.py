"""Find the folder for files that later runs can reuse."""

import os
import tempfile
from pathlib import Path


def find_cache_folder(name: str) -> Path:
    """Find a folder in the user's cache, which may not exist yet; without a home, in the system's temporary folder.

    Args:
        name: name of the folder.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # unchanged if there is no home
    folder = Path(cache, "gqaprune", name)
    nearest = next((place for place in folder.parents if place.exists()), Path())
    if not folder.is_absolute() or not os.access(nearest, os.W_OK):
        return Path(tempfile.gettempdir(), f"gqaprune-{getattr(os, 'getuid', int)()}", name)
    return folder
