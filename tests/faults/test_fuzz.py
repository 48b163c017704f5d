"""Hundreds of broken configs, images and weights files, the same every time; tools/torture/fuzz.py has thousands."""

from __future__ import annotations

import pytest

from tools.torture import fuzz as torture_fuzz
from tools.torture.fuzz import KINDS, Outcome, Worker, fuzz, judged
from tools.torture.fuzz_files import Case

CASES = {"config text": 200, "config values": 200, "picture": 150, "weights": 100}


def test_any_input_works_or_is_refused_in_one_line(monkeypatch):
    """A file from a stranger or a bad disk must not end in a traceback, a hang, or out of memory."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    failures: list[str] = []

    def report(case: Case, outcome: Outcome) -> None:
        failures.append(f"{case.kind} {case.argv}: {outcome.wrong}\n{outcome.err[-2000:]}")

    tallies = fuzz(CASES, 1, 1, report)
    assert not failures, "\n\n".join(failures)
    assert CASES.keys() == KINDS.keys()
    for kind, tally in tallies.items():
        assert tally.codes and tally.cases > 0.9 * CASES[kind]
        assert tally.codes["0"] and tally.codes["3"], kind  # some cases work, some are refused


WRONG = {
    "a bug": (1, "", "Traceback (most recent call last):\n  ...\n"),
    "a traceback before the error": (3, "", "Traceback:\npipeline: error: a.png: no such file.\n"),
    "two errors": (3, "", "pipeline: error: a\npipeline: error: b\n"),
    "a library's own words": (3, "", "libpng warning: bad\npipeline: error: a\n"),
    "words beside a plan": (0, "stage 0", "TIFFReadDirectory: Warning, Unknown field.\n"),
    "words before an error": (3, "stage 0", "pipeline: error: a\n"),
    "nothing": (3, "", ""),
    "a screen cleared": (3, "", "pipeline: error: \x1b[2J\n"),
    "a signal": (None, "", ""),
    "damage": (6, "", "pipeline: error: a\n"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_judge_detects_every_kind_of_failure(case):
    """A judge that accepts everything would make every fuzz test pass."""
    code, out, err = WRONG[case]
    assert judged(Outcome(code, out, err, 0.1, 0), "picture")
    assert not judged(Outcome(3, "", "pipeline: error: a.png: no such file.\n", 0.1, 0), "picture")
    assert not judged(Outcome(0, "stage 0", "", 0.1, 0), "picture")
    assert judged(Outcome(0, "stage 0", "", 1000.0, 0), "picture")
    many = "pipeline: error:\nc.yaml:1:1: seed: unknown\nc.yaml:2:1: size: found 3\n"
    assert judged(Outcome(3, "", many, 0.1, 0), "picture") and not judged(Outcome(3, "", many, 0.1, 0), "config text")


def take_all_memory(case, main):
    """Replaces the command that a worker runs."""
    if case.kind == "dies":
        torture_fuzz.os.abort()
    torture_fuzz.time.sleep(1000)


def serve_wrong(connection, folder):
    """A worker that dies or hangs."""
    torture_fuzz.run_case = take_all_memory
    torture_fuzz.serve(connection, folder)


def test_a_worker_that_dies_or_hangs_is_detected(monkeypatch):
    """A crash of a decoder ends the process: it must be counted, and the next case run."""
    monkeypatch.setattr(torture_fuzz, "serve", serve_wrong)
    monkeypatch.setattr(torture_fuzz, "WALL_S", 20.0)
    worker = Worker()
    try:
        assert "died" in worker.run(Case("dies", {})).wrong
        assert "hangs" in worker.run(Case("hangs", {})).wrong
    finally:
        worker.close()
