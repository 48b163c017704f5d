"""Whose turn the disk is: the update waits for tiles that are read, and never for longer."""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest

from pipeline.executors.disk_turns import GIVE_WAY_TO, DiskTurns


def gives_way(turns: DiskTurns) -> threading.Thread:
    """A thread that does so."""
    thread = threading.Thread(target=turns.give_way, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("tiles", range(GIVE_WAY_TO + 2))
def test_the_update_gives_way_to_tiles_that_are_read_together(tiles):
    """On a slow disk the network waits for its tiles; but one tile alone leaves the disk idle half of the time."""
    turns = DiskTurns()
    with ExitStack() as reading:
        for _ in range(tiles):
            reading.enter_context(turns.reading())
        waiting = gives_way(turns)
        waiting.join(0.2 if tiles >= GIVE_WAY_TO else 30)
        assert waiting.is_alive() == (tiles >= GIVE_WAY_TO)
    waiting.join(30)
    assert not waiting.is_alive()


def test_a_tile_that_cannot_be_read_holds_nothing_up():
    """The run would hang instead of telling what is wrong with the disk."""
    turns = DiskTurns()
    for _ in range(GIVE_WAY_TO):
        with pytest.raises(OSError, match="broken"), turns.reading():
            raise OSError("broken")
    turns.give_way()
