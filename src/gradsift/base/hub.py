"""Whether the Hugging Face hub can be reached: where it cannot, its libraries answer from their cache at once."""

from __future__ import annotations

import os
import socket
import sys
import urllib.request
from urllib.parse import urlsplit

_MODULES = ("huggingface_hub.constants", "datasets.config")
_SWITCH = "HF_HUB_OFFLINE"
_ours = False  # whether the switch was set here


def look() -> None:
    """Set `HF_HUB_OFFLINE` while the name of the hub's host is not known here, as without a network.

    The libraries would otherwise ask for every file six times, 40 s in all. What a user has set stays; with a proxy
    names are not looked up here.
    """
    global _ours
    if not _ours and os.environ.get(_SWITCH):
        return
    found = urllib.request.getproxies().keys() & {"https", "all"} or _known(
        urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname or ""
    )
    if bool(found) != _ours:
        return  # nothing has changed
    _ours = not found
    if _ours:
        os.environ[_SWITCH] = "1"
    else:
        del os.environ[_SWITCH]
    for module in (sys.modules[name] for name in _MODULES if name in sys.modules):
        setattr(module, _SWITCH, _ours)  # read from the environment once, at import


def _known(host: str) -> bool:
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
