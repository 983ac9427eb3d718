"""Whether the hub can be reached, asked once in a few seconds instead of by each library several times."""

import os
import ssl
import sys
import threading
import urllib.error
import urllib.request
from functools import cache

from huggingface_hub import constants

_PATIENCE = 4.0
"""Seconds to wait for an answer of any kind."""


def check_hub() -> None:
    """Let libraries look into their caches alone where the hub does not answer, or is not to be asked."""
    if not constants.HF_HUB_OFFLINE and not can_reach(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = True  # what is_offline_mode() looks at
        os.environ["HF_HUB_OFFLINE"] = "1"  # for what is imported later, and for other processes
    if constants.HF_HUB_OFFLINE and (config := sys.modules.get("datasets.config")) is not None:
        vars(config)["HF_HUB_OFFLINE"] = True


@cache
def can_reach(endpoint: str) -> bool:
    """Whether something answers at an address within seconds; names may take longer than that to resolve."""
    answers: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(endpoint, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=_PATIENCE).close()
        except urllib.error.HTTPError:
            pass  # which is an answer
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ssl.SSLError):  # libraries may know certificates that this does not
                return
        except (OSError, ValueError):
            return
        answers.append(True)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_PATIENCE)
    return bool(answers)
