"""The measurement before a run: what `plan --time` says, and what a long run says at its start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import pipeline
from pipeline.commands import measure
from pipeline.core.events import Event, IterationDone, Note
from pipeline.plan.power import PowerMeter
from tests.support.e2e import write_run

TWO_STAGES = {"initial_size": 48, "style_stages": False, "optimizer": {"max_iterations": 3}}


@pytest.fixture(autouse=True)
def soon(monkeypatch) -> None:
    monkeypatch.setattr(measure, "BUDGET_S", 1.0)


def test_plan_says_how_long_the_run_takes_and_how_much_energy(tmp_path, call):
    """A day and its electricity are the first questions before a poster. The watts are the user's, if given."""
    config = write_run(tmp_path, (96, 64), (40, 40), **TWO_STAGES)
    before = sorted(path.name for path in tmp_path.iterdir())
    shown = call("plan", "-c", config, "--time", "--watts", "200", "--json")
    assert shown.code == 0, shown.err
    time = json.loads(shown.out)["time"]
    assert len(time["stages_s"]) == 2 and 0 < time["stages_s"][0] < time["stages_s"][1]
    assert time["seconds"] == pytest.approx(sum(time["stages_s"]) + time["export_s"])
    assert time["energy_kwh"] == pytest.approx(time["seconds"] * 200 / 3.6e6)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert call("plan", "-c", config, "--watts", "200").code == 2  # which would change nothing


@pytest.mark.e2e
@pytest.mark.parametrize(
    "keys",
    [
        {"content": None, "size": 96, "loss": {"content_weight": 0.0}},
        {"color": "luminance"},
        {"store": {"state_dtype": "compact", "chunk_px": 32}, "optimizer": {"max_iterations": 1, "average": 0.9}},
        {"compute": {"device": "cpu", "tile_px": 64, "workers": 1}},
        {"stages": [{"up_to": 50, "optimizer": {"max_iterations": 1}}]},
        {"loss": {"scales": 2}},
    ],
    ids=str,
)
def test_every_kind_of_run_can_be_measured(tmp_path, keys):
    """Measured are the settings of the run; those that it cannot be measured with would get no time at all."""
    config = pipeline.load_config(write_run(tmp_path, (96, 64), (40, 40), **{**TWO_STAGES, **keys}))
    found = pipeline.measured_time(config, pipeline.plan(config))
    assert found is not None and found.seconds > 0


def test_a_long_run_says_its_time_at_its_start(tmp_path, monkeypatch):
    """Before an iteration is done, and so that its first estimate of what is left has something to go by."""
    config = pipeline.load_config(write_run(tmp_path, (96, 64), (40, 40), **TWO_STAGES))
    events: list[Event] = []
    pipeline.run(config, sink=events.append)
    assert not any("the run takes" in event.message for event in events if isinstance(event, Note))  # it is short
    first = next(event for event in events if isinstance(event, IterationDone))
    assert first.eta_s is None
    monkeypatch.setattr(measure, "_WORTH_MEASURING_FLOP", {"cpu": 0})
    events.clear()
    longer = config.model_copy(update={"work_dir": tmp_path / "other", "output": tmp_path / "other.png"})
    pipeline.run(longer, sink=events.append)
    (said,) = [event.message for event in events if isinstance(event, Note) and "the run takes" in event.message]
    assert "Wh" in said or " J" in said
    first = next(event for event in events if isinstance(event, IterationDone))
    assert first.eta_s is not None
    assert (tmp_path / "other.png").read_bytes() == config.output.read_bytes()


def test_a_disk_without_space_for_it_prevents_only_the_measurement(tmp_path, monkeypatch):
    """The run may have its space: it refuses by itself if not."""
    config = pipeline.load_config(write_run(tmp_path, (96, 64), (40, 40), **TWO_STAGES))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "mkdir", full)
    notes: list[Event] = []
    assert pipeline.measured_time(config, pipeline.plan(config), sink=notes.append) is None
    assert "could not be measured" in str(notes[-1])


def test_the_source_of_the_watts_is_said():
    """The energy is a guess where the machine does not say what it draws."""
    with PowerMeter("cpu") as meter:
        sum(range(100_000))
    power = meter.power()
    assert power.watts > 0 and ("assumed" in power.source)
