"""The profiler: sums and traces match what the threads did, and no other file is overwritten."""

from __future__ import annotations

import json
import threading
import time

import pytest

from pipeline.cli.display import busy_line
from pipeline.core import profiler
from pipeline.core.errors import ConfigError
from tests.support.e2e import run_pipeline, write_run


def test_seconds_are_summed_by_kind_over_threads():
    """The sums include all threads, not only the main one."""
    profiler.take()

    def work() -> None:
        with profiler.span("read"):
            time.sleep(0.02)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    with profiler.span("write"):
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    sums = profiler.take()
    assert sums["read"] >= 0.06 and sums["write"] >= 0.01 and sums.keys() == {"read", "write"}
    assert profiler.take() == {}


def test_a_failed_span_counts_too():
    """A span that raises counts as well."""
    profiler.take()
    with pytest.raises(ZeroDivisionError), profiler.span("compute"):
        raise ZeroDivisionError
    assert "compute" in profiler.take()


def test_a_trace_is_one_list_after_a_resume(tmp_path):
    """A resumed run appends to the trace of the stopped one."""
    path = tmp_path / "trace.json"
    for tile in range(2):
        with profiler.recording(path), profiler.span("compute", tile=tile):
            pass
        with profiler.span("compute", tile="unrecorded"):
            pass
    events = json.loads(path.read_text().rstrip().rstrip(",") + "]")
    assert [event["args"] for event in events] == [{"tile": 0}, {"tile": 1}]
    assert all(event["ph"] == "X" and event["dur"] >= 0 and event["tid"] for event in events)
    assert events[0]["ts"] + events[0]["dur"] <= events[1]["ts"]


def test_another_file_is_left_alone(tmp_path):
    """A wrong path after --profile must not damage an image."""
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ConfigError, match="is not a trace"), profiler.recording(path):
        pass
    assert path.read_bytes() == b"\x89PNG\r\n"
    with pytest.raises(ConfigError, match="cannot be written"), profiler.recording(tmp_path / "gone" / "t.json"):
        pass


def test_the_summary_says_how_much_of_the_time_was_computing():
    """This number distinguishes a slow disk from a slow device."""
    line = busy_line({"wall": 10.0, "compute": 9.5, "read": 1.25})
    assert "computing 9.5s of 10.0s (95%)" in line and "read 1.2s" in line and "write 0.0s" in line


@pytest.mark.e2e
def test_a_run_can_be_profiled(tmp_path):
    """`--profile` from the command line to the trace file."""
    config = write_run(tmp_path, size=100)
    trace = tmp_path / "trace.json"
    done = run_pipeline("run", "-c", config, "--profile", trace, "--log-format", "plain")
    assert done.code == 0, done.err
    assert "busy: computing" in done.err
    events = json.loads(trace.read_text().rstrip().rstrip(",") + "]")
    assert {event["name"] for event in events} == {"read", "wait", "compute", "write", "update"}
