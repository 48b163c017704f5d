"""Where the scheduler of a cluster is, and the key by which its members know each other.

A scheduler runs whatever code it is sent. Beyond the loopback device all connections are encrypted, and accepted only
from processes that have the key: one PEM file with a private key, its certificate, and that of its issuer if another
has signed it.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from distributed import Security

from pipeline.core.errors import ConfigError, storage
from pipeline.core.files import read_regular
from pipeline.core.text import shown

SCHEDULER_FILE, KEY_FILE = "scheduler.json", "cluster.pem"
_MAX_BYTES = 2**20
_PEM_BLOCK = re.compile(r"-----BEGIN ([A-Z ]+)-----.*?-----END \1-----\n?", re.DOTALL)


@dataclass(frozen=True)
class ClusterAddress:
    """The address of a scheduler, with the key of its cluster; without one, connections are not encrypted."""

    address: str
    security: Security

    @property
    def protocol(self) -> str:
        """`tls` or `tcp`."""
        return self.address.partition("://")[0]


def find_scheduler(scheduler: str | Path, key: Path | None) -> ClusterAddress:
    """The scheduler at an address, or in a scheduler file or the folder that has one. `key`: see above.

    Raises ConfigError.
    """
    address = scheduler
    if isinstance(scheduler, Path):
        file = scheduler / SCHEDULER_FILE if scheduler.is_dir() else scheduler
        address, key = _address_in(file), key or file.with_name(KEY_FILE)
    address = str(address)
    if address.startswith("tls://"):
        if key is None:
            raise ConfigError(f"compute.scheduler: {address} needs the key of the cluster: set compute.cluster_key.")
        return ClusterAddress(address, read_key(key))
    if not _is_loopback(address):
        raise ConfigError(
            f"compute.scheduler: {shown(address)} is refused: without encryption, everybody in its network could run "
            "programs on your machines. Use tls://, as `pipeline scheduler` does."
        )
    return ClusterAddress(address, Security())  # type: ignore[no-untyped-call]


def _address_in(file: Path) -> str:
    try:
        address = json.loads(read_regular(file, _MAX_BYTES))["address"]
        if not isinstance(address, str) or not re.fullmatch(r"(tcp|tls)://[^/\s]+", address):
            raise ValueError("no address")
    except FileNotFoundError as error:
        raise ConfigError(
            f"compute.scheduler: there is no scheduler file {file}. `pipeline scheduler FOLDER` starts a "
            "scheduler, and writes it there."
        ) from error
    except (ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"compute.scheduler: {file} is not the file of a scheduler.") from error
    return address


def write_scheduler_file(folder: Path, address: str) -> Path:
    """Say where the scheduler is, in the format of dask's own scheduler files. Raises StorageError."""
    file = folder / SCHEDULER_FILE
    partial = file.with_suffix(".json.partial")
    with storage(file):
        partial.write_text(json.dumps({"type": "Scheduler", "address": address}) + "\n", encoding="utf-8")
        partial.replace(file)
    return file


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_key(file: Path) -> Security:
    """The key in a PEM file, which only its owner may read. Raises ConfigError, StorageError."""
    with storage(file):
        try:
            text = read_regular(file, _MAX_BYTES).decode("ascii", errors="replace")
            mode = file.stat().st_mode
        except FileNotFoundError as error:
            text = f"the key of the cluster, {file}, does not exist. `pipeline scheduler` makes it."
            raise ConfigError(text) from error
        except ValueError as error:
            raise ConfigError(f"the key of the cluster, {file}, cannot be used: {error}.") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"the key of the cluster, {file}, can be read by others: with it they could run programs as you. "
            "Delete it and start `pipeline scheduler` again, which makes a new one (or `chmod 600`, if nobody read it)."
        )
    blocks = [(match[1], match[0]) for match in _PEM_BLOCK.finditer(text)]
    keys = [block for kind, block in blocks if kind.endswith("PRIVATE KEY")]
    certificates = [block for kind, block in blocks if kind == "CERTIFICATE"]
    if len(keys) != 1 or not certificates:
        raise ConfigError(f"{file} is not the key of a cluster: a PEM file with a private key and its certificate.")
    # the last certificate is the issuer's; of a key that signed itself it is the only one
    return _security(keys[0], "".join(certificates), certificates[-1])


def _security(key: str, certificates: str, issuer: str) -> Security:
    members = {
        f"tls_{role}_{part}": text
        for role in ("client", "scheduler", "worker")
        for part, text in (("key", key), ("cert", certificates))
    }
    return Security(tls_ca_file=issuer, require_encryption=True, **members)  # type: ignore[no-untyped-call]


def make_key(file: Path) -> None:
    """Write a new key, valid for a year. Raises StorageError."""
    new = Security.temporary()  # type: ignore[no-untyped-call]
    with storage(file):
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as out:
            out.write(new.tls_client_key + new.tls_client_cert)
