"""The measurement before a run: what `plan --time` says, and what a long run says at its start."""

from __future__ import annotations

import json
import re
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

import pipeline
from pipeline.commands import measure
from pipeline.core.events import Event, IterationDone, Note
from pipeline.plan import power
from pipeline.plan.power import PowerMeter
from pipeline.render import residency
from pipeline.render.stage import Stage
from pipeline.store import ResidentStage
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


@pytest.mark.parametrize(("interval", "in_memory"), [("30s", True), (0, False)])
def test_a_run_in_memory_is_measured_in_memory(tmp_path, monkeypatch, interval, in_memory):
    """What iterations from the disk take is no measure of those in memory, and larger stages are judged by it."""
    keys = {**TWO_STAGES, "store": {"commit_interval": interval}}
    config = pipeline.load_config(write_run(tmp_path, (96, 64), (40, 40), **keys))
    entered, real = [], residency.resident

    def resident(stage: Stage, *state: Any) -> AbstractContextManager[ResidentStage | None]:
        entered.append(stage.plan.size)
        return real(stage, *state)

    monkeypatch.setattr(residency, "resident", resident)
    assert pipeline.measured_time(config, pipeline.plan(config)) is not None
    assert bool(entered) == in_memory


def test_a_long_run_says_its_time_at_its_start(tmp_path, monkeypatch):
    """Before an iteration is done, and so that its first estimate of what is left has something to go by."""
    config = pipeline.load_config(write_run(tmp_path, (96, 64), (40, 40), **TWO_STAGES))
    events: list[Event] = []
    pipeline.run(config, sink=events.append)
    assert not any("the run takes" in event.message for event in events if isinstance(event, Note))  # it is short
    first = next(event for event in events if isinstance(event, IterationDone))
    assert first.eta_s is None
    monkeypatch.setattr(measure, "_WORTH_MEASURING_S", 0.0)
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


def test_run_uses_the_watts_that_are_given(tmp_path, call, monkeypatch):
    """At its start, if it measures, and at its end; a socket meter knows more than this program."""
    config = write_run(tmp_path, (96, 64), (40, 40), **TWO_STAGES)
    monkeypatch.setattr(measure, "_WORTH_MEASURING_S", 0.0)
    said = call("run", "-c", config, "--watts", "3600000")
    assert said.code == 0 and "at 3600000 W (as given)" in said.err
    took = re.search(r"this took ([0-9]+)s and ([0-9.]+) (k|M)Wh, at 3.6e\+06 W", " ".join(said.err.split()))
    assert took and float(took[2]) * (1 if took[3] == "k" else 1000) == pytest.approx(float(took[1]), abs=0.6)


def write_zone(folder: Path, zone: str, name: str, joule: float) -> None:
    """A zone of RAPL as Linux shows it; `intel-rapl:0:0` is a part of `intel-rapl:0`."""
    path = folder / zone
    path.mkdir(exist_ok=True)
    (path / "name").write_text(f"{name}\n")
    (path / "energy_uj").write_text(f"{round(joule * 1e6)}\n")


def test_a_processor_is_measured_by_the_counters_of_its_packages(tmp_path, monkeypatch):
    """The board's counter has the packages too, and a core's is a part of them: they would count twice."""
    monkeypatch.setattr(power, "_RAPL", tmp_path)
    zones = {"0": "package-0", "1": "package-1", "2": "psys", "0:0": "core"}
    for zone, name in zones.items():
        write_zone(tmp_path, f"intel-rapl:{zone}", name, 1000)
    with PowerMeter("cpu") as meter:
        for zone, name in zones.items():
            write_zone(tmp_path, f"intel-rapl:{zone}", name, 1500)
    assert meter.power().watts == pytest.approx(power.REST_W + 2 * 500 / meter._seconds)
    assert meter.power().source == "processor by RAPL, 60 W assumed for the rest"
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()  # as for who is not root
    assert power._rapl_joule() is None


def test_a_gpu_is_measured_by_nvidia_smi(tmp_path, monkeypatch):
    """The median of its samples: one at the start is of a device that idles."""
    program, asked = tmp_path / "nvidia-smi", tmp_path / "asked"
    program.write_text(f'#!/bin/sh\necho "$@" >> {asked}\ntest $(wc -l < {asked}) = 1 && echo 20.5 || echo 300.25\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(power, "_SAMPLE_S", 0.01)
    monkeypatch.setattr(power, "_RAPL", tmp_path)
    monkeypatch.setattr(power, "_gpu_name", lambda device: "GPU-1234")  # torch has no device to ask here
    with PowerMeter("cuda:0") as meter:
        while not asked.exists() or len(asked.read_text().splitlines()) < 4:
            time.sleep(0.01)
    assert meter.power().watts == pytest.approx(power.REST_W + 300.25)
    assert meter.power().source == "GPU by nvidia-smi, 60 W assumed for the rest"
    assert set(asked.read_text().splitlines()) == {"--query-gpu=power.draw --format=csv,noheader,nounits -i GPU-1234"}
    program.write_text("#!/bin/sh\necho '[N/A]'\n")  # as for devices that do not measure
    with PowerMeter("cuda:0") as meter:
        meter._sampler.join()
    assert "assumed" in meter.power().source


def test_the_source_of_the_watts_is_said():
    """The energy is a guess where the machine does not say what it draws."""
    with PowerMeter("cpu") as meter:
        sum(range(100_000))
    power = meter.power()
    assert power.watts > 0 and ("assumed" in power.source)
