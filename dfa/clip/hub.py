"""Weights that open_clip and timm fetch from the Hugging Face hub at their first use."""

import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants


@contextmanager
def only_what_is_cached_without_a_network() -> Iterator[None]:
    """Where the hub's name does not resolve, nothing is asked of it: what was fetched before is found, the rest fails at once.

    Left alone the hub's client tries for 50 s, and says so in a line for each attempt. Behind a proxy it is the proxy that resolves.
    """
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or not _resolves()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _resolves() -> bool:
    address = urllib.parse.urlsplit(constants.ENDPOINT)
    if address.hostname is None or urllib.request.getproxies():
        return True
    try:
        socket.getaddrinfo(address.hostname, address.port or 443)
    except OSError:
        return False
    return True
