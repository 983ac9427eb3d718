"""The hub is asked once, for seconds; libraries then look into their caches alone."""

import http.server
import os
import socket
import ssl
import threading
import time
import urllib.error
from collections.abc import Iterator

import datasets
import pytest
from huggingface_hub import constants, is_offline_mode

import gqaprune
from gqaprune.models import hub


@pytest.fixture(autouse=True)
def connected(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub.can_reach.cache_clear()
    yield
    hub.can_reach.cache_clear()


@pytest.fixture
def silent() -> Iterator[str]:
    """An address that takes connections and says nothing."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_hub_that_does_not_answer_is_asked_once_and_for_seconds(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", silent)
    monkeypatch.setattr(hub, "_PATIENCE", 0.3)
    began = time.monotonic()
    with pytest.raises(ValueError, match="use a local folder, or set HF_ENDPOINT to a mirror of the hub"):
        gqaprune.load_model("someone/something")
    with pytest.raises(ValueError, match="cannot load a model from 'someone/other', which is not a local folder"):
        gqaprune.load_model("someone/other")
    assert time.monotonic() - began < 5
    assert is_offline_mode() and datasets.config.HF_HUB_OFFLINE and os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_certificate_that_is_not_known_here_is_an_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise urllib.error.URLError(ssl.SSLCertVerificationError("self-signed"))

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    assert hub.can_reach("https://mirror.example")


def test_any_answer_will_do() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:  # which says 501
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert hub.can_reach(f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
    assert not hub.can_reach("http://127.0.0.1:9")
