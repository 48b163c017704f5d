"""What a user sees of a run's events, which come from several threads: on a terminal, in a log, as JSON."""

from __future__ import annotations

import io
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from pipeline.cli.display import LiveSink, make_sink
from pipeline.core.events import Event, IterationDone, Note, StageDone, StageStarted, WorkDone, in_order
from tests.support.e2e import PIPELINE, TIMEOUT_S, write_run
from tests.support.terminal import Screen, Terminal

THREADS = 8


class Display(io.StringIO):
    """stderr as a terminal, and what it shows."""

    def __init__(self, columns: int):
        super().__init__()
        self.screen = Screen(columns)

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.screen.feed(text.replace("\n", "\r\n").encode())
        return len(text)

    def settle(self, reached: Callable[[list[str]], object]) -> list[str]:
        """The bars, once they are as they should be: they are drawn ten times a second."""
        deadline = time.monotonic() + 5
        while not reached(self.screen.bars) and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.screen.bars


def terminal_of(monkeypatch, columns: int = 80) -> Display:
    """Makes stderr a terminal. No fixture: pytest puts its own stderr in place after those."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    display = Display(columns)
    monkeypatch.setattr(sys, "stderr", display)
    return display


@pytest.fixture
def eager_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def at_once(sink: Callable[[Event], None], events: list[list[Event]]) -> None:
    """Every list of events on a thread of its own, all at the same time."""
    barrier = threading.Barrier(len(events))

    def send(own: list[Event]) -> None:
        barrier.wait()
        for event in own:
            sink(event)

    threads = [threading.Thread(target=send, args=(own,)) for own in events]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def work(what: str, done: int, total: int = 9, stage: int = 0) -> WorkDone:
    return WorkDone(stage, what, done, total)


def started(stage: int, iterations: int = 40) -> StageStarted:
    return StageStarted(stage, 4, 75, 100, 9, 0, iterations)


def iterated(iteration: int, eta_s: float | None = 7_400) -> IterationDone:
    return IterationDone(0, iteration, 40, 1.0, 0.01234, 0.000234, 0.51, 1.0, 0.1, {"gram": 1.0}, {"wall": 1.0}, eta_s)


@pytest.mark.parametrize("log_format", ["plain", "json", "live"])
def test_lines_of_several_threads_stay_whole(monkeypatch, eager_switches, log_format):
    """Two lines in one could be read by no person, and by no program."""

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            time.sleep(0)  # another thread has its turn
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", Slow())
    stream = sys.stderr
    notes = [[Note(f"thread {thread} note {note}") for note in range(50)] for thread in range(THREADS)]
    with make_sink(log_format) as sink:
        at_once(sink, [list(own) for own in notes])
    lines = stream.getvalue().splitlines()
    if log_format == "json":
        lines = [json.loads(line)["message"] for line in lines]
    assert sorted(filter(None, lines)) == sorted(note.message for own in notes for note in own)


def test_the_first_events_of_a_pass_share_one_line(monkeypatch, eager_switches):
    """After a resume `check 1/8` would stay under three stages: the first two threads each had added a line."""
    display = terminal_of(monkeypatch)
    for _ in range(30):
        with LiveSink() as sink:
            sink(started(0))
            at_once(sink, [[work("check", done + 1, THREADS)] for done in range(THREADS)])
            sink(work("check", 8, THREADS))
            bars = display.settle(lambda bars: bars[1:] and "8/8" in bars[1])
            assert [bar.split()[0] for bar in bars] == ["stage", "check"]


def test_passes_at_once_have_a_line_each_and_the_next_takes_the_free_one(monkeypatch):
    """One line would flicker between two passes, or the display would jump up and down."""
    display = terminal_of(monkeypatch)
    with LiveSink() as sink:
        sink(started(0))
        for done in range(1, 9):
            sink(work("gradient pass", done))
            sink(work("update pass", done))
            bars = display.settle(lambda bars, done=done: sum(f" {done}/9" in bar for bar in bars) == 2)
            assert [bar.split()[0] for bar in bars] == ["stage", "gradient", "update"]
        sink(work("gradient pass", 9))
        sink(work("Gram pass", 1))
        bars = display.settle(lambda bars: any("Gram" in bar for bar in bars))
        assert [bar.split()[0] for bar in bars] == ["stage", "Gram", "update"]
        sink(work("update pass", 9))
        sink(work("Gram pass", 9))
        sink(work("gradient pass", 1))
        bars = display.settle(lambda bars: any("gradient" in bar for bar in bars))
        assert len(bars) == 3


def test_tasks_that_end_at_once_are_counted_in_order(eager_switches):
    """A bar would go backwards, and stay at 7/8 after its pass."""
    for _ in range(20):
        told: list[tuple[int, int]] = []
        then: list[int] = []

        def tell(done: int, total: int, told: list[tuple[int, int]] = told) -> None:
            time.sleep(0)  # another thread has its turn
            told.append((done, total))

        one_more = in_order(tell, 4 * THREADS, then.append)
        at_once(lambda _event, one_more=one_more: one_more(), [[Note("")] * 4 for _ in range(THREADS)])
        assert told == [(done, 4 * THREADS) for done in range(1, 4 * THREADS + 1)]
        assert sorted(then) == list(range(1, 4 * THREADS + 1))


def test_passes_of_a_single_tile_are_shown_at_every_iteration(monkeypatch):
    """The line would be frozen at a pass of the first iteration."""
    display = terminal_of(monkeypatch)
    with LiveSink() as sink:
        sink(started(0))
        for _ in range(3):
            for what in ("Gram", "gradient", "update"):
                sink(work(what, 1, 1))
                bars = display.settle(lambda bars, what=what: bars[1:] and bars[1].startswith(what))
                assert len(bars) == 2 and bars[1].startswith(what)


def test_nothing_of_a_stage_is_left_when_the_next_begins(monkeypatch):
    """It would look as if the run still did what it has done long ago."""
    display = terminal_of(monkeypatch)
    with LiveSink() as sink:
        sink(work("download", 5))
        sink(started(0))
        sink(work("check", 4))
        sink(StageDone(0, 40, "max_iterations"))
        assert display.settle(lambda bars: not bars) == []
        sink(work("check", 4))
        sink(started(1))
        sink(work("Gram pass", 1, stage=1))
        bars = display.settle(lambda bars: len(bars) == 2)
        assert bars[0].startswith("stage 1") and bars[1].startswith("Gram pass")


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_numbers_are_whole_in_narrow_terminals(monkeypatch, columns):
    """In a window beside an editor nobody could see how far the run is, or how long it takes."""
    display = terminal_of(monkeypatch, columns)
    with LiveSink() as sink:
        sink(started(0))
        sink(iterated(11))
        sink(work("content features", 12_345, 67_890))
        first, second = display.settle(lambda bars: bars[1:] and "12345" in bars[1])
        assert first.startswith("stage 0") and "2h 03m left" in first and first.endswith("12/40")
        assert second.startswith("content features") and second.endswith("12345/67890")
        assert ("mean|u| 0.510" in first) == (columns >= 60)
        assert ("content 0.0123" in first) == (columns >= 120)
        assert max(map(len, (first, second))) <= columns - 4  # room for ^C, twice
    assert display.screen.bars == []


def two_bars(screen: Screen) -> bool:
    """A run is under way: its iterations, and a pass."""
    return len(screen.bars) >= 2 and "/10000" in screen.bars[0]


@pytest.mark.e2e
@pytest.mark.parametrize("columns", [40, 80])
def test_ctrl_c_leaves_no_bar_behind(tmp_path, columns):
    """The terminal's ^C would push the bars up a line, and a dead copy of them would stay above the prompt."""
    config = write_run(tmp_path, (90, 70), optimizer={"max_iterations": 10_000})
    for _ in range(2):  # the second is a resume
        terminal = Terminal(columns, PIPELINE, "run", "-c", config)
        terminal.wait_until(two_bars)
        assert not terminal.screen.cursor_shown
        terminal.type(b"\x03")
        assert terminal.wait() == 75
        screen = terminal.screen
        assert screen.bars == [] and screen.cursor_shown
        text = "".join(screen.lines)
        assert text.startswith("starting") and "once more to abort" in text and "^C" not in text


@pytest.mark.e2e
@pytest.mark.parametrize("columns", [40, 80])
def test_a_second_ctrl_c_leaves_no_bar_behind(tmp_path, columns):
    """The prompt would stand beside a bar, without a cursor."""
    config = write_run(tmp_path, (90, 70), optimizer={"max_iterations": 10_000})
    terminal = Terminal(columns, PIPELINE, "run", "-c", config)
    terminal.wait_until(two_bars)
    terminal.type(b"\x03\x03")
    code = terminal.wait()
    assert code in (75, 130)  # it may have stopped before it heard of the second
    assert terminal.screen.bars == [] and terminal.screen.cursor_shown


def test_a_terminal_that_is_full_holds_no_lock_of_the_farewell(monkeypatch):
    """The second Ctrl-C would wait for a terminal that takes nothing."""
    terminal_of(monkeypatch)
    with LiveSink() as sink:
        sink(started(0))
        with sink._lock:
            told: list[bytes] = []
            thread = threading.Thread(target=lambda: told.append(sink.farewell()), daemon=True)
            thread.start()
            thread.join(TIMEOUT_S)
            assert told and told[0].endswith(b"\x1b[?25h")
