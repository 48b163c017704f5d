"""The sources of weights: torchvision's download, a file that the user names, or a seed; and equality of specs."""

from __future__ import annotations

import hashlib
import http.server
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from pipeline.core.cancel import CancelToken
from pipeline.core.errors import InputError, Stopped
from pipeline.core.events import Event
from pipeline.core.vgg_layers import VGG19_WIDTHS
from pipeline.network import download as weights_download
from pipeline.network import weights
from pipeline.network.weights import RANDOM_WIDTHS, NetworkSpec, WeightsSource, find_weights, sha256_of, widths_for_plan
from tests.support import reference


@dataclass
class Served:
    """A file on a local server, and the requests that it received."""

    data: bytes
    url: str = ""
    requests: list[str] = field(default_factory=list)
    answer: str = "whole"  # or "short", "missing", "garbage", "silent" for a while after half of the file
    resume: threading.Event = field(default_factory=threading.Event)  # ends the silence


def make_handler(served: Served) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.requests.append(self.path)
            if served.answer == "garbage":
                self.wfile.write(b"this is no HTTP\r\n\r\n")
                return
            self.send_response(404 if served.answer == "missing" else 200)
            self.send_header("Content-Length", str(len(served.data)))
            self.end_headers()
            half = served.data[: len(served.data) // 2]
            self.wfile.write(half if served.answer in ("short", "silent") else served.data)
            if served.answer == "silent":
                served.resume.wait(60)
                with suppress(OSError):  # the client may be gone
                    self.wfile.write(served.data[len(half) :])

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty hub folder of torch; returns the path of its downloads."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    return tmp_path / "hub" / "checkpoints"


@pytest.fixture
def served(tmp_path, monkeypatch, hub) -> Iterator[Served]:
    """A VGG-19-shaped file in torchvision's format, served on 127.0.0.1 in place of torchvision's."""
    torch.save(
        reference.torchvision_names(reference.narrow_state()),
        tmp_path / "weights",
        _use_new_zipfile_serialization=False,
    )
    served = Served((tmp_path / "weights").read_bytes())
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), make_handler(served))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}/models/vgg19-test.pth"
    monkeypatch.setattr(weights, "VGG19_URL", served.url)
    monkeypatch.setattr(weights, "VGG19_SHA256_PREFIX", hashlib.sha256(served.data).hexdigest()[:8])
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield served
    served.resume.set()
    server.shutdown()
    server.server_close()
    thread.join()


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# --- the download ---


def test_vgg19_is_downloaded_once(served, hub):
    """Half a gigabyte: the second run must not download it again, and the first must report progress."""
    events: list[str] = []
    first = find_weights("vgg19", None, 0, lambda event: events.append(str(event)))
    assert first.path == hub / "vgg19-test.pth"
    assert first.path.read_bytes() == served.data
    assert "downloading VGG-19's weights, 548 MiB" in events[0]
    assert "'download'" in events[-1]
    assert first.widths["conv5_1"] == 8
    assert find_weights("vgg19", None, 0) == first
    assert served.requests == ["/models/vgg19-test.pth"]
    assert left_in(hub) == ["vgg19-test.pth"]


def test_a_file_that_is_there_already_is_used_offline(hub, monkeypatch):
    """On a cluster without internet the user copies the file there, as the error message says."""
    hub.mkdir(parents=True)
    torch.save(reference.narrow_state(), hub / "vgg19-dcbb9e9d.pth")
    monkeypatch.setattr(weights, "VGG19_URL", f"http://127.0.0.1:{closed_port()}/vgg19-dcbb9e9d.pth")
    assert find_weights("vgg19", None, 0).path == hub / "vgg19-dcbb9e9d.pth"


def test_a_download_with_another_hash_is_discarded(served, hub, monkeypatch):
    """A wrong file under the right name would be used by every later run, and by other programs."""
    monkeypatch.setattr(weights, "VGG19_SHA256_PREFIX", "0badc0de")
    with pytest.raises(InputError, match=r"could not be downloaded.*hash"):
        find_weights("vgg19", None, 0)
    assert left_in(hub) == []


@pytest.mark.parametrize("answer", ["short", "missing", "garbage"])
def test_a_download_that_fails_says_what_to_do(served, hub, answer):
    """A broken connection, a moved file, the login page of a public network."""
    served.answer = answer
    with pytest.raises(InputError) as caught:
        find_weights("vgg19", None, 0)
    for part in (served.url, str(hub / "vgg19-test.pth"), "network.weights"):
        assert part in str(caught.value)
    assert left_in(hub) == []
    served.answer = "whole"
    assert find_weights("vgg19", None, 0).path == hub / "vgg19-test.pth"


def test_a_download_that_is_stopped_at_once_leaves_nothing(served, hub):
    """The download thread may start only after the stop has removed its file: it must not create it again."""
    # On a busy machine the thread starts late.
    opened = threading.Event()
    thread_run = threading.Thread.run

    def late(self: threading.Thread) -> None:
        if self.name == "download":
            opened.wait(30)
        thread_run(self)

    cancel = CancelToken()
    cancel.set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "run", late)
        with pytest.raises(Stopped):
            find_weights("vgg19", None, 0, cancel=cancel)
    (thread,) = [thread for thread in threading.enumerate() if thread.name == "download"]
    opened.set()
    thread.join(30)
    assert left_in(hub) == []


def test_a_silent_server_is_given_up(served, hub, monkeypatch):
    """A run would wait for ever for a server that keeps the connection and sends nothing."""
    monkeypatch.setattr(weights_download, "_TIMEOUT_S", 1)
    served.answer = "silent"
    with pytest.raises(InputError, match=r"could not be downloaded.*nothing for 1 s"):
        find_weights("vgg19", None, 0)
    assert left_in(hub) == []


def test_a_download_that_is_stopped_half_way_ends_and_leaves_nothing(served, hub):
    """Ctrl-C ends the program within a moment, whatever the server does; a program that lives on would go on
    downloading half a gigabyte into a deleted file."""
    served.answer = "silent"
    served.data += bytes(1 << 20)
    cancel, partials = CancelToken(), []

    def stop_at_the_first_bytes(_event: Event) -> None:
        if left_in(hub) and not partials:
            partials.append(next(hub.iterdir()).open("rb"))
            threading.Timer(0.5, cancel.set).start()

    start_s = time.monotonic()
    with pytest.raises(Stopped):
        find_weights("vgg19", None, 0, stop_at_the_first_bytes, cancel)
    assert time.monotonic() - start_s < 20
    with partials[0] as deleted:
        size = os.fstat(deleted.fileno()).st_size
        served.resume.set()
        for thread in [thread for thread in threading.enumerate() if thread.name == "download"]:
            thread.join(30)
            assert not thread.is_alive()
        assert 0 < size == os.fstat(deleted.fileno()).st_size
    assert left_in(hub) == []


def test_two_downloads_at_once_end_with_one_file(served, hub):
    """Two runs that are started together on a new machine must not remove or mix each other's half."""
    with ThreadPoolExecutor(2) as pool:
        sources = list(pool.map(lambda _: find_weights("vgg19", None, 0), range(2)))
    assert sources[0] == sources[1]
    assert left_in(hub) == ["vgg19-test.pth"]
    assert (hub / "vgg19-test.pth").read_bytes() == served.data


KILLED = """
import os, signal, sys, threading
from pathlib import Path
from pipeline.network.download import download

def kill(size_bytes):
    os.kill(os.getpid(), signal.SIGKILL)

download(sys.argv[1], Path(sys.argv[2]), "", on_progress=kill)
"""


def test_what_a_killed_download_leaves_is_removed_by_the_next(served, hub):
    """Every kill would take half a gigabyte of the disk for ever, in a hidden folder."""
    command = [sys.executable, "-c", KILLED, served.url, str(hub / "vgg19-test.pth")]
    killed = subprocess.run(command, env={**os.environ, "no_proxy": "127.0.0.1"}, check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert len(left_in(hub)) == 1
    find_weights("vgg19", None, 0)
    assert left_in(hub) == ["vgg19-test.pth"]


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_offline_says_what_to_do(hub, monkeypatch):
    """Machines without a network are common: the message names the file, and where to copy it."""
    url = f"http://127.0.0.1:{closed_port()}/vgg19-dcbb9e9d.pth"
    monkeypatch.setattr(weights, "VGG19_URL", url)
    with pytest.raises(InputError) as caught:
        find_weights("vgg19", None, 0)
    for part in (url, "Download that file elsewhere", str(hub / "vgg19-dcbb9e9d.pth"), "network.weights"):
        assert part in str(caught.value)
    assert left_in(hub) == []


def test_a_hub_folder_that_cannot_be_made_says_what_to_do(served, tmp_path):
    """A home folder that cannot be written, as in many containers."""
    (tmp_path / "hub").write_text("a file where the folder should be")
    with pytest.raises(InputError, match=r"could not be downloaded.*network\.weights"):
        find_weights("vgg19", None, 0)


def test_the_url_and_its_hash_are_torchvisions():
    """The name carries the hash: the two must agree."""
    assert weights.VGG19_URL == "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"
    assert weights.VGG19_SHA256_PREFIX == "dcbb9e9d"


# --- which file, which widths ---


def test_the_plan_needs_no_download(hub, monkeypatch):
    """`plan` must not wait for a download of half a gigabyte."""
    monkeypatch.setattr(weights, "VGG19_URL", f"http://127.0.0.1:{closed_port()}/vgg19-dcbb9e9d.pth")
    assert widths_for_plan("vgg19", None) == VGG19_WIDTHS
    assert widths_for_plan("random", None) == RANDOM_WIDTHS
    assert left_in(hub) == []


def test_a_named_file_is_taken_whatever_the_network_is_called(narrow_weights):
    """network.weights takes precedence over network.name, for the plan and for the render."""
    for name in ("vgg19", "vgg19-lite"):
        source = find_weights(name, narrow_weights, 0)
        assert source.path == narrow_weights
        assert source.widths == widths_for_plan(name, narrow_weights)


def test_the_packaged_network_is_there():
    """The network that comes with the package must work without a download."""
    for name, path in weights.PACKAGED.items():
        source = find_weights(name, None, 0)
        assert source.path == path
        assert source.widths == widths_for_plan(name, None)
        assert set(source.widths) == set(reference.CONVS)


def test_the_hash_is_that_of_the_file(narrow_weights):
    """A resume compares it: other weights under the same name would mix two images."""
    assert sha256_of(narrow_weights) == hashlib.sha256(narrow_weights.read_bytes()).hexdigest()
    assert find_weights("vgg19", narrow_weights, 0).sha256 == sha256_of(narrow_weights)


def test_random_sources_differ_by_their_seed():
    """Random weights depend on the seed alone."""
    assert find_weights("random", None, 1) == find_weights("random", None, 1)
    assert find_weights("random", None, 1) != find_weights("random", None, 2)


def test_specs_survive_a_trip_to_a_worker(narrow_weights):
    """A worker caches its network by the spec: an unequal copy would make every task read the file again."""
    spec = NetworkSpec(find_weights("vgg19", narrow_weights, 0), "zeros", "max", "float32", "cpu")
    again = pickle.loads(pickle.dumps(spec))
    assert again == spec
    other = NetworkSpec(
        WeightsSource(narrow_weights, 0, spec.source.widths, "0" * 64), "zeros", "max", "float32", "cpu"
    )
    assert other != spec
