"""Joining a Ray cluster: the one that RAY_ADDRESS names, the one that `ray start` left running here, or a new one."""

import logging
import os
import socket
from pathlib import Path

import ray
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray.exceptions import AuthenticationError

ADDRESS, AUTH_MODE = "RAY_ADDRESS", "RAY_AUTH_MODE"
_TOKEN, _TOKEN_PATH = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_PROBE_S = 10.0
_ATTEMPTS, _TOO_SLOW = 2, "timed out during startup"

logger = logging.getLogger(__name__)


class NoClusterError(ValueError):
    """The cluster that the environment names cannot be joined; the message says which and what to set."""


def join_cluster(num_cpus: int | None = None) -> None:
    """`ray.init()`, with the token where there is one, and with an error that a user can act on.

    Ray itself sends no token to an address that was given by name; we do, since a cluster that `ray start` made asks for
    it. RAY_AUTH_MODE=disabled opts out.

    Raises:
        NoClusterError: nothing answers there, or it refuses the token.
    """
    named = _named_address()
    address = named or _left_address()
    if address and not _answers(address):
        raise NoClusterError(f"{_explanation(named)} (nothing answers there)")
    if named:
        # Ray reads RAY_AUTH_MODE when it is first imported; this is how it changes its own mind later.
        maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    try:
        _start_or_join(num_cpus)
    except (ConnectionError, AuthenticationError) as error:
        raise NoClusterError(f"{_explanation(named)}; {_token_advice()}") from error


def _start_or_join(num_cpus: int | None) -> None:
    for attempt in reversed(range(_ATTEMPTS)):
        try:
            ray.init(num_cpus=num_cpus, logging_level=logging.WARNING)
            return
        except Exception as error:  # what Ray raises here has no class of its own
            if _TOO_SLOW not in str(error) or not attempt:
                raise
            logger.warning("Ray did not start within its 30 s (a busy machine): once more")


def _answers(address: str) -> bool:
    """Whether something listens at HOST:PORT: Ray would look for it for minutes. Other forms are left to Ray."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return True
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S).close()
    except OSError:
        return False
    return True


def address_file() -> Path:
    """Where `ray start` leaves the address of its cluster; a cluster that died leaves it behind."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp") / "ray" / "ray_current_cluster"


def _named_address() -> str:
    """RAY_ADDRESS where it names a cluster, else ""; "auto" and "local" name none."""
    address = os.environ.get(ADDRESS, "")
    return "" if address in ("auto", "local") else address


def _left_address() -> str:
    """What Ray would join where RAY_ADDRESS names nothing; "" where it starts a cluster of its own."""
    file = address_file()
    if os.environ.get(ADDRESS) == "local" or not file.is_file():
        return ""
    return file.read_text(encoding="utf-8").strip()


def _explanation(named: str) -> str:
    if named:
        return (
            f"Ray at {ADDRESS}={named} cannot be joined: check that it runs and that this is the address of its head"
            " (HOST:6379, not the dashboard's)"
        )
    return (
        f"Ray at {_left_address() or 'an unknown address'}, which {address_file()} names, cannot be joined: if that cluster"
        f" has ended, run `ray stop` or delete the file; set {ADDRESS}=HOST:PORT for another cluster, {ADDRESS}=local for"
        " one of this job's own"
    )


def _token_advice() -> str:
    mode = os.environ.get(AUTH_MODE)
    if mode != "token":
        return (
            f"a cluster that asks for a token wants {AUTH_MODE}=token (now {mode or 'unset'}) and the token in {_TOKEN},"
            f" in the file {_TOKEN_PATH}, or in ~/.ray/auth_token"
        )
    source = _TOKEN if os.environ.get(_TOKEN) else os.environ.get(_TOKEN_PATH) or "~/.ray/auth_token"
    return f"{AUTH_MODE}=token is set: the token in {source} must be the one that the cluster was started with"
