"""What keeps a cluster's tasks, members and views of the folder apart: fence, key and addresses."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from functools import partial
from pathlib import Path

import psutil
import pytest

from pipeline.core.cancel import CancelToken
from pipeline.core.errors import ConfigError, LockedError, Stopped
from pipeline.executors import addresses, fence
from pipeline.executors.cluster import serve_scheduler
from pipeline.executors.fence import Fence, bar_earlier_tasks, probe, run_fenced, versions


def ignore(_message: str) -> None:
    pass


def of(folder: Path, token: str, **changed: object) -> Fence:
    return Fence(**{"folder": folder, "token": token, "versions": versions(), **changed})


def test_a_start_waits_for_tasks_of_the_one_before(tmp_path):
    """A task of a killed run would write chunks of an old iteration into the resumed run."""
    bar_earlier_tasks(tmp_path, "first", CancelToken(), ignore)
    running, may_end, barred = threading.Event(), threading.Event(), threading.Event()

    def task() -> None:
        running.set()
        may_end.wait()

    def next_start() -> None:
        bar_earlier_tasks(tmp_path, "second", CancelToken(), ignore)
        barred.set()

    threads = [threading.Thread(target=partial(run_fenced, of(tmp_path, "first"), task))]
    threads[0].start()
    running.wait()
    threads.append(threading.Thread(target=next_start))
    threads[1].start()
    assert not barred.wait(0.3)
    with pytest.raises(ConfigError, match="sees another state"):  # it would begin while the start waits
        run_fenced(of(tmp_path, "first"), pytest.fail)
    may_end.set()
    for thread in threads:
        thread.join()
    assert run_fenced(of(tmp_path, "second"), abs, -1) == 1


def test_a_start_that_waits_can_be_stopped(tmp_path):
    """A worker that hangs on another machine would make Ctrl-C useless."""
    cancel = CancelToken()
    cancel.set()
    with (tmp_path / fence.LOCK_NAME).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        with pytest.raises(Stopped):
            bar_earlier_tasks(tmp_path, "next", cancel, ignore)


def test_a_task_is_refused_where_it_would_compute_other_bytes(tmp_path):
    """Another torch, or other weights on one of the machines: the image would have seams that nobody finds."""
    weights = tmp_path / "weights"
    weights.write_text("same")
    digest = fence._sha256(weights)
    bar_earlier_tasks(tmp_path, "token", CancelToken(), ignore)
    assert run_fenced(of(tmp_path, "token", files=((weights, digest),)), abs, -1) == 1
    with pytest.raises(ConfigError, match=r"torch 1\.0.*last bits"):
        others = tuple("torch 1.0" if name.startswith("torch") else name for name in versions())
        run_fenced(of(tmp_path, "token", versions=others), pytest.fail)
    for files in (((weights, "0" * 64),), ((tmp_path / "none", digest),)):
        with pytest.raises(ConfigError, match=r"file .*network\.weights"):
            run_fenced(of(tmp_path, "token", files=files), pytest.fail)
    with pytest.raises(ConfigError, match="does not see"):
        run_fenced(of(tmp_path / "elsewhere", "token"), pytest.fail)


def test_a_worker_with_another_view_of_the_folder_is_found(tmp_path):
    """It would read pixels of an earlier iteration."""
    fence.write_in_place(tmp_path / fence.PROBE_NAME, "now")
    with fence.all_locked(tmp_path):
        assert probe(tmp_path, "now", "answer", "yes") == ""
        assert fence.read_small(tmp_path / "answer") == "yes"
        assert "old state" in probe(tmp_path, "later", "answer", "")
        assert "does not see" in probe(tmp_path / "elsewhere", "now", "answer", "")
    assert "ignores file locks" in probe(tmp_path, "now", "answer", "")  # here: nobody holds one


def test_what_is_written_in_place_leaves_nothing_of_before(tmp_path):
    """A token with the tail of a longer one would refuse every task."""
    for text in ("longer", "short"):
        fence.write_in_place(tmp_path / "file", text)
    assert (tmp_path / "file").read_text() == "short"


@pytest.mark.parametrize("address", ["tcp://10.0.0.5:8786", "tcp://example.org:8786", "tcp://[2001:db8::1]:8786"])
def test_connections_beyond_this_machine_are_encrypted(tmp_path, address):
    """Everybody in the network could run programs on all machines of the cluster."""
    file = tmp_path / addresses.SCHEDULER_FILE
    file.write_text(json.dumps({"address": address}))
    for scheduler in (address, file, tmp_path):
        with pytest.raises(ConfigError, match="tls://") as caught:
            addresses.find_scheduler(scheduler, None)
        assert "\n" not in str(caught.value)
    assert addresses.find_scheduler("tcp://127.0.0.1:8786", None).address == "tcp://127.0.0.1:8786"


def test_the_key_of_a_cluster_is_its_owners(tmp_path):
    """Whoever reads it can run programs as its owner."""
    addresses.make_key(key := tmp_path / addresses.KEY_FILE)
    addresses.write_scheduler_file(tmp_path, "tls://10.0.0.5:8786")
    security = addresses.find_scheduler(tmp_path, None).security
    assert security.require_encryption
    assert addresses.find_scheduler("tls://10.0.0.5:8786", key).security.tls_client_key == security.tls_client_key
    with pytest.raises(ConfigError, match=r"compute\.cluster_key"):
        addresses.find_scheduler("tls://10.0.0.5:8786", None)
    assert key.stat().st_mode & 0o777 == 0o600
    key.chmod(0o640)
    with pytest.raises(ConfigError, match="read by others"):
        addresses.find_scheduler(tmp_path, None)
    os.truncate(key, 0)
    key.chmod(0o600)
    with pytest.raises(ConfigError, match="not the key of a cluster"):
        addresses.find_scheduler(tmp_path, None)
    key.unlink()
    with pytest.raises(ConfigError, match="does not exist"):
        addresses.find_scheduler(tmp_path, None)


@pytest.mark.parametrize("text", ["", "[]", '{"address": 5}', '{"address": "http://a"}'])
def test_a_file_that_is_no_schedulers_is_refused(tmp_path, text):
    """The path may be that of the config itself."""
    file = tmp_path / "scheduler.json"
    file.write_text(text)
    with pytest.raises(ConfigError, match="not the file of a scheduler"):
        addresses.find_scheduler(file, None)
    with pytest.raises(ConfigError, match=r"no scheduler file.*pipeline scheduler"):
        addresses.find_scheduler(tmp_path / "none.json", None)


def test_a_folder_has_one_scheduler(tmp_path):
    """A second one would replace its address: workers and runs that come later would compute apart from the others."""
    ended = threading.Event()

    def serve_again(address: str, file: Path) -> None:
        with pytest.raises(LockedError, match="another scheduler serves this folder"):
            serve_scheduler(tmp_path, "127.0.0.1", 0, ended, ignore)
        assert json.loads(file.read_text())["address"] == address
        ended.set()

    serve_scheduler(tmp_path, "127.0.0.1", 0, ended, serve_again)
    assert ended.is_set()


def test_beside_the_encrypted_port_a_scheduler_opens_none_to_others(tmp_path, recwarn):
    """distributed's own HTTP server is not encrypted, and warned of its port where another program had it."""
    ended, found = threading.Event(), []

    def look(address: str, _file: Path) -> None:
        listening = [one for one in psutil.Process().net_connections("tcp") if one.status == psutil.CONN_LISTEN]
        port = int(address.rpartition(":")[2])
        found.extend(one.laddr for one in listening if one.laddr.port != port and one.laddr.ip != "127.0.0.1")
        ended.set()

    serve_scheduler(tmp_path, None, 0, ended, look)
    assert ended.is_set() and not found
    assert not [one for one in recwarn if "in use" in str(one.message)]
