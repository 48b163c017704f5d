"""Who may read the page: the token in the address, and the Host header.

The server listens on this machine only, but every user of the machine and every page in the browser can reach it. The
token keeps the users out. The Host header keeps out a page whose name was made to resolve to 127.0.0.1 (DNS rebinding):
its requests carry that name.
"""

from __future__ import annotations

import ipaddress
import socket
from urllib.parse import urlsplit

from pipeline.core.errors import ConfigError

MIN_TOKEN = 16
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def check_token(token: str) -> None:
    """Raise ConfigError for a token that is short, or has characters that an address cannot."""
    if len(token) < MIN_TOKEN or not all(char.isascii() and (char.isalnum() or char in "-_") for char in token):
        raise ConfigError(
            f"--token: give at least {MIN_TOKEN} letters, digits, - or _; it is all that protects the page."
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server at this address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def allowed_host(header: str | None, listening: str) -> bool:
    """Whether a Host header names this server. The port may differ: `ssh -L` forwards from any other."""
    name = _name(header)
    if name is None:
        return False
    if name in _LOOPBACK or name == listening.lower():
        return True
    if is_loopback(listening):
        return False
    # an address is no name that somebody else's name server could answer
    return _is_address(name) or name in (socket.gethostname().lower(), socket.getfqdn().lower())


def same_origin(origin: str | None, host: str | None) -> bool:
    """Whether a request that changes something comes from the page itself. Programs other than browsers send none."""
    return origin is None or urlsplit(origin).netloc == host


def _name(header: str | None) -> str | None:
    try:
        return urlsplit(f"//{header}").hostname if header else None
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
