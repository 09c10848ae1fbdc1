"""Without a network the hub's libraries answer from their cache at once."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from gradsift.base import hub
from gradsift.store.remote import at_hand


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A name service that can be cut off; nothing is set by the user."""
    import datasets.config
    from huggingface_hub import constants

    for name in ("HF_HUB_OFFLINE", "HF_ENDPOINT", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_ours", False)
    asked: list[str] = []

    def plug(there: bool) -> list[str]:
        def resolve(host: str, *_: object) -> list[Any]:
            asked.append(host)
            if not there:
                raise socket.gaierror(-2, "Name or service not known")
            return []

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        return asked

    yield plug
    os.environ.pop("HF_HUB_OFFLINE", None)


def test_a_hub_that_cannot_be_reached_is_not_asked(network: Any) -> None:
    """A name that is no folder here switches the libraries off while there is no network, and on again after."""
    import datasets.config
    from huggingface_hub import constants

    asked = network(False)
    assert at_hand("nobody/nothing") == "nobody/nothing"
    assert asked == ["huggingface.co"]
    assert constants.is_offline_mode()
    assert datasets.config.HF_HUB_OFFLINE
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    network(True)
    at_hand("nobody/nothing")
    assert not constants.is_offline_mode()
    assert not datasets.config.HF_HUB_OFFLINE
    assert "HF_HUB_OFFLINE" not in os.environ


def test_what_is_here_or_set_asks_nobody(network: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """A folder, a user's own switch and a proxy are taken as they are."""
    asked = network(False)
    at_hand(str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    hub.look()
    monkeypatch.delenv("https_proxy")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub.look()
    assert asked == []
    assert os.environ["HF_HUB_OFFLINE"] == "0"
