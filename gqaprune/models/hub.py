"""Check once, within seconds, whether the hub can be reached, instead of several times by each library."""

import os
import ssl
import sys
import threading
import urllib.error
import urllib.request
from functools import cache

from huggingface_hub import constants

_PATIENCE = 4.0
"""Seconds to wait for any answer."""


def check_hub() -> None:
    """Restrict libraries to their caches if the hub does not answer or offline mode is set."""
    if not constants.HF_HUB_OFFLINE and not can_reach(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True  # read by is_offline_mode()
        os.environ["HF_HUB_OFFLINE"] = "1"  # for later imports and other processes
    if constants.HF_HUB_OFFLINE and (config := sys.modules.get("datasets.config")) is not None:
        vars(config)["HF_HUB_OFFLINE"] = True


@cache
def can_reach(endpoint: str) -> bool:
    """Return whether an address answers within seconds; resolving its name may take longer than that."""
    answers: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(endpoint, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=_PATIENCE).close()
        except urllib.error.HTTPError:
            pass  # an error page is an answer
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ssl.SSLError):  # libraries may have certificates that Python lacks
                return
        except (OSError, ValueError):
            return
        answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return bool(answers)
