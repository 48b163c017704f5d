"""The display of events from several threads: on a terminal, in a log, as JSON."""

from __future__ import annotations

import io
import json
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator

import pytest

from pipeline.cli.display import LiveSink, make_sink
from pipeline.core.events import Event, IterationDone, Note, StageDone, StageStarted, WorkDone, in_order
from tests.support.e2e import PIPELINE, TIMEOUT_S, write_run
from tests.support.terminal import Screen, Terminal

THREADS = 8


class Display(io.StringIO):
    """A stderr that is a terminal, with its screen."""

    def __init__(self, columns: int):
        super().__init__()
        self.screen = Screen(columns)

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.screen.feed(text.replace("\n", "\r\n").encode())
        return len(text)

    def settle(self, reached: Callable[[list[str]], object]) -> list[str]:
        """The bars once they satisfy `reached`; rich draws them ten times per second."""
        deadline = time.monotonic() + 5
        while not reached(self.screen.bars) and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.screen.bars


def terminal_of(monkeypatch, columns: int = 80) -> Display:
    """Make stderr a terminal. Not a fixture, because pytest replaces stderr after the fixtures."""
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
    """Send every list of events from a thread of its own, all at the same time."""
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
    """Interleaved lines could not be read, nor parsed as JSON."""

    class Slow(io.StringIO):
        def write(self, text: str) -> int:
            time.sleep(0)  # lets another thread run
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
    """If two threads each added a bar, `check 1/8` would remain on the screen."""
    display = terminal_of(monkeypatch)
    for _ in range(30):
        with LiveSink() as sink:
            sink(started(0))
            at_once(sink, [[work("check", done + 1, THREADS)] for done in range(THREADS)])
            sink(work("check", 8, THREADS))
            bars = display.settle(lambda bars: bars[1:] and "8/8" in bars[1])
            assert [bar.split()[0] for bar in bars] == ["stage", "check"]


def test_passes_at_once_have_a_line_each_and_the_next_takes_the_free_one(monkeypatch):
    """A shared bar would alternate between two passes; a new bar per pass would make the display jump."""
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
    """Otherwise a bar would move backwards, and end at 7/8."""
    for _ in range(20):
        reports: list[tuple[int, int]] = []

        def report(done: int, total: int, reports: list[tuple[int, int]] = reports) -> None:
            time.sleep(0)  # lets another thread run
            reports.append((done, total))

        finish_one = in_order(report, 4 * THREADS)
        at_once(lambda _event, finish_one=finish_one: finish_one(), [[Note("")] * 4 for _ in range(THREADS)])
        assert reports == [(done, 4 * THREADS) for done in range(1, 4 * THREADS + 1)]


def test_passes_of_a_single_tile_are_shown_at_every_iteration(monkeypatch):
    """Otherwise the bar would stay at a pass of the first iteration."""
    display = terminal_of(monkeypatch)
    with LiveSink() as sink:
        sink(started(0))
        for _ in range(3):
            for what in ("Gram", "gradient", "update"):
                sink(work(what, 1, 1))
                bars = display.settle(lambda bars, what=what: bars[1:] and bars[1].startswith(what))
                assert len(bars) == 2 and bars[1].startswith(what)


def test_the_bars_of_a_stage_are_removed_at_its_end(monkeypatch):
    """Old bars would show work that has ended."""
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
        assert bars[0].startswith("stage 2 of 4") and bars[1].startswith("Gram pass")


@pytest.mark.parametrize("columns", [40, 60, 80, 120])
def test_numbers_are_whole_in_narrow_terminals(monkeypatch, columns):
    """Progress and remaining time are readable in a narrow window."""
    display = terminal_of(monkeypatch, columns)
    with LiveSink() as sink:
        sink(started(0))
        sink(iterated(11))
        sink(work("content features", 12_345, 67_890))
        first, second = display.settle(lambda bars: bars[1:] and "12345" in bars[1])
        assert first.startswith("stage 1") and "2h 03m left" in first and first.endswith("12/40")
        assert second.startswith("content features") and second.endswith("12345/67890")
        assert ("stage 1 of 4" in first) == (columns >= 60)
        assert ("mean|u| 0.510" in first) == (columns >= 80)
        assert ("content 0.0123" in first) == (columns >= 120)
        assert max(map(len, (first, second))) <= columns - 4  # room for ^C, twice
    assert display.screen.bars == []


def test_a_log_tells_the_progress_of_work_that_takes_long(monkeypatch):
    """A preview in a pipe printed nothing for minutes; a log of days must not have a line per tile."""
    now = [0.0]
    monkeypatch.setattr("pipeline.cli.display.time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with make_sink("plain") as sink:
        for percent in range(101):
            now[0] += 1
            sink(work("image 1 of 2", percent, 100))
        sink(Note("image 1 of 2: done"))
        now[0] += 9
        sink(work("image 2 of 2", 1, 100))
    lines = [f"  image 1 of 2: {percent} %" for percent in (9, 29, 69)]
    assert sys.stderr.getvalue().splitlines() == [*lines, "image 1 of 2: done"]


def two_bars(screen: Screen) -> bool:
    """Whether the bars of the iterations and of a pass are shown."""
    return len(screen.bars) >= 2 and "/10000" in screen.bars[0]


@pytest.mark.e2e
@pytest.mark.parametrize("columns", [40, 80])
def test_ctrl_c_leaves_no_bar_behind(tmp_path, columns):
    """The echo of ^C must not wrap, or a copy of the bars would stay above the prompt."""
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
        assert text.startswith("starting") and "interrupt again to abort" in text and "^C" not in text


@pytest.mark.e2e
@pytest.mark.parametrize("columns", [40, 80])
def test_a_second_ctrl_c_leaves_no_bar_behind(tmp_path, columns):
    """An abort restores the cursor and removes the bars."""
    config = write_run(tmp_path, (90, 70), optimizer={"max_iterations": 10_000})
    terminal = Terminal(columns, PIPELINE, "run", "-c", config)
    terminal.wait_until(two_bars)
    terminal.type(b"\x03\x03")
    code = terminal.wait()
    assert code in (75, 130)  # it may have stopped before the second signal arrived
    assert terminal.screen.bars == [] and terminal.screen.cursor_shown


def test_a_note_that_comes_while_the_display_ends_leaves_no_bar_behind(monkeypatch):
    """Ctrl-C prints its note from another thread; printed among rich's last lines, it would keep the bars above it."""
    display = terminal_of(monkeypatch)
    sink = LiveSink().__enter__()
    sink(started(0))
    sink(work("check", 1))
    display.settle(lambda bars: bars[1:])
    console = sink._progress.console
    pop, notes = console.pop_render_hook, list[threading.Thread]()

    def pop_while_a_note_is_printed() -> None:
        pop()  # from here to the end of stop(), rich no longer moves the bars below what is printed
        notes.append(threading.Thread(target=sink, args=(Note("stopping after the tiles in flight"),)))
        notes[0].start()
        notes[0].join(0.5)

    monkeypatch.setattr(console, "pop_render_hook", pop_while_a_note_is_printed)
    sink.__exit__()
    notes[0].join(TIMEOUT_S)
    assert display.screen.bars == [] and "stopping after the tiles in flight" in display.screen.shown


def test_a_terminal_that_is_full_holds_no_lock_of_the_farewell(monkeypatch):
    """A second Ctrl-C must abort even if the terminal blocks a thread that holds the lock."""
    terminal_of(monkeypatch)
    with LiveSink() as sink:
        sink(started(0))
        with sink._lock:
            farewells: list[bytes] = []
            thread = threading.Thread(target=lambda: farewells.append(sink.farewell()), daemon=True)
            thread.start()
            thread.join(TIMEOUT_S)
            assert farewells and farewells[0].endswith(b"\x1b[?25h")
