"""Where is kept what later runs can use."""

import os
import tempfile
from pathlib import Path


def find_cache_folder(name: str) -> Path:
    """A folder in the user's cache, which need not be there yet; in the system's temporary one without a home.

    Args:
        name: of what is kept.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")  # which stays as it is without a home
    folder = Path(cache, "gqaprune", name)
    nearest = next((place for place in folder.parents if place.exists()), Path())
    if not folder.is_absolute() or not os.access(nearest, os.W_OK):
        return Path(tempfile.gettempdir(), f"gqaprune-{getattr(os, 'getuid', int)()}", name)
    return folder
