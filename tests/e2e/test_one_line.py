"""Command lines with images, queues of configs, and the command at the end."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from pipeline import load_config
from pipeline.commands.queue import exit_code_of, run_queue
from pipeline.config.one_line import OneLine, document_of
from pipeline.core.events import IterationDone, QueuedRunStarted
from tests.support.e2e import PIPELINE, journal, read_picture, write_config, write_picture, write_run
from tests.support.terminal import Terminal

SMALL = [
    *("--set", "network.name=random", "--set", "optimizer.max_iterations=2", "--set", "initial_size=48"),
    *("--set", "store.chunk_px=32", "--set", "compute.device=cpu"),
]


@pytest.fixture
def images(tmp_path, monkeypatch) -> Path:
    """The current folder, with a content and two styles in a folder below."""
    (tmp_path / "in").mkdir()
    for seed, name in enumerate(("photo.png", "ink #1.png", "oil.png")):
        write_picture(tmp_path / "in" / name, 70, 52, seed)
    monkeypatch.chdir(tmp_path)
    return tmp_path


LINE = ["run", "in/photo.png", "in/ink #1.png", "in/oil.png:0.5", "-o", "out.png", "--size", "60", *SMALL]


@pytest.mark.quick
def test_one_line_renders_writes_its_config_and_resumes(images, call):
    """An artist's first picture needs no YAML; the same line again must not start from the beginning."""
    outcome = call(*LINE)
    assert outcome.code == 0, outcome.err
    assert read_picture(images / "out.png").shape == (45, 60, 3)
    config = load_config("out.yaml")
    assert [(style.image.name, style.weight) for style in config.styles] == [("ink #1.png", 1.0), ("oil.png", 0.5)]
    assert config.optimizer.max_iterations == 2 and config.size == 60
    records, text = journal(images / "out.run"), Path("out.yaml").read_text()
    again = call(*LINE)
    assert again.code == 0 and "already there" in again.err
    assert journal(images / "out.run") == records and Path("out.yaml").read_text() == text
    assert call("run", "out.yaml").code == 0 and call("run", "-c", "out.yaml").code == 0
    # the project can be moved as a whole
    assert {"in/photo.png", "in/oil.png"} <= {line.split(": ")[-1] for line in text.splitlines()}


@pytest.mark.quick
def test_another_line_does_not_replace_the_config_of_a_run(images, call):
    """The config is the record of how a picture was made, and may have been edited."""
    assert call(*LINE).code == 0
    text = Path("out.yaml").read_text()
    outcome = call(*LINE, "--set", "loss.tv_weight=0.5")
    assert outcome.code == 3 and "differs from this one in loss.tv_weight" in outcome.err
    assert "pipeline run" in outcome.err and Path("out.yaml").read_text() == text


def test_a_file_of_another_program_is_kept(images, call):
    """`out.yaml` may be anything."""
    Path("out.yaml").write_text("services: {web: {image: nginx}}\n")
    outcome = call(*LINE)
    assert outcome.code == 3 and "Move it away, or choose another -o" in outcome.err
    assert "nginx" in Path("out.yaml").read_text() and not Path("out.run").exists()


def test_print_size_and_resolution_reach_the_config():
    """A poster is ordered in centimetres."""
    document = document_of(OneLine("c.jpg", ("s.jpg:0.5",), "o.tif", size="60cm", dpi="150"))
    assert document.data == {
        "content": "c.jpg",
        "styles": [{"image": "s.jpg", "weight": 0.5}],
        "output": "o.tif",
        "size": "60cm",
        "export": {"dpi": 150},
    }


@pytest.mark.parametrize(
    ("line", "code", "words"),
    [
        (["in/photo.png"], 2, "at least one style image"),
        (["in/photo.png", "in/oil.png"], 2, "-o out.png"),
        (["in/photo.png", "a.yaml", "-o", "o.png"], 2, "a.yaml is a config and in/photo.png an image"),
        (["in/photo.png", "words", "-o", "o.png"], 2, "words is a config and in/photo.png an image"),
        (["a.yaml", "--size", "64"], 2, "--set size=4096"),
        (["a.yaml", "-c", "a.yaml"], 2, "not both"),
        (["empty"], 2, "a folder without configs"),
        ([], 2, "give a content image and its style images"),
        (["gone.png", "in/oil.png", "-o", "o.png"], 3, "gone.png: content: no such file"),
        (["in/phto.png", "in/oil.png", "-o", "o.png"], 3, "did you mean 'photo.png'?"),
        (["in/photo.png", "in/oil.png:0,5", "-o", "o.png"], 3, "write 0.5, with a point"),
        (["in/photo.png", "in/oil.png:-1", "-o", "o.png"], 3, "in/oil.png:-1: styles.0.weight: expected a number >= 0"),
        (["in/photo.png", "in/oil.png", "-o", "o.gif"], 3, "-o o.gif: output: has the suffix"),
        (["in/photo.png", "in/oil.png", "-o", "none/o.png"], 3, "there is no folder"),
        (["in/photo.png", "in/oil.png", "-o", "o.png", "--size", "8"], 3, "--size 8: size: expected"),
        (["in/photo.png", "in/oil.png", "-o", "in/photo.png"], 3, "the same file as content"),
        (["in/photo.png", "in/oil.png", "-o", "o.png", "--set", "memory.limit=1MiB"], 3, "memory.limit"),
    ],
)
def test_lines_that_cannot_be_run_leave_nothing(images, call, line, code, words):
    """A mistyped line is answered with the argument at fault, and leaves no files that block the next."""
    Path("words").write_text("content: a.png\nstyles: []\n")
    Path("empty").mkdir()
    before = sorted(images.rglob("*"))
    outcome = call("run", *line, "--set", "network.name=random")
    assert outcome.code == code and words in outcome.err, outcome.err
    assert sorted(images.rglob("*")) == before


def test_a_name_that_ends_like_a_weight_is_a_name(images, call):
    """`take:2` may be a file."""
    shutil.copy("in/oil.png", "take:2")
    assert call("init", "in/photo.png", "take:2", "-o", "out.png").code == 0
    assert load_config("out.yaml").styles[0].image == images / "take:2"


@pytest.mark.quick
@pytest.mark.parametrize("full", [False, True])
def test_init_fills_in_and_says_what_run_would_do(images, call, full):
    """The written config must render what the line renders, be readable, and hold the options of the line."""
    options = ["--preset", "portrait", "--size", "64", "--set", "work_dir=Poster #3.run"]
    assert call("init", *LINE[1:6], *options, *(["--full"] if full else [])).code == 0
    config, text = load_config("out.yaml"), Path("out.yaml").read_text()
    assert (config.preset, config.size, config.work_dir.name) == ("portrait", 64, "Poster #3.run")
    small = {
        "preset": "portrait",
        "size": 64,
        "output": "out.png",
        "content": "in/photo.png",
        "work_dir": "Poster #3.run",
    }
    small["styles"] = [{"image": "in/ink #1.png"}, {"image": "in/oil.png", "weight": 0.5}]
    Path("small.yaml").write_text(yaml.safe_dump(small))
    assert load_config("small.yaml") == config
    assert all(len(line) <= 60 for line in text.splitlines() if line.lstrip().startswith("#"))
    keys = [line for line in text.splitlines() if ": " in line and not line.lstrip().startswith(("#", "- "))]
    assert len(keys) <= 14 or full
    assert call("init", *LINE[1:6], *options).code == 3  # and does not overwrite it
    shown = call("init", "-", "in/photo.png", "in/oil.png", "-o", "out/o.png")
    assert yaml.safe_load(shown.out)["content"] == "in/photo.png"


def queue_of(folder: Path) -> list[Path]:
    """Three configs of which the second is invalid."""
    write_run(folder, initial_size=80)
    paths = [
        write_config(folder, f"{name}.yaml", output=f"{name}.png", work_dir=f"{name}.run", initial_size=80, **keys)
        for name, keys in (("a", {}), ("b", {"content": "gone.png"}), ("c", {"size": 64}))
    ]
    (folder / "config.yaml").unlink()
    return paths


@pytest.mark.quick
def test_a_queue_renders_what_it_can_and_says_the_rest(tmp_path, call):
    """A mistake in one config must not cost a night of rendering the others."""
    paths = queue_of(tmp_path)
    (tmp_path / "._a.yaml").write_bytes(b"\0")  # as macOS leaves them
    note = tmp_path / "note"
    outcome = call("run", tmp_path, paths[0], "--on-finish", f"echo $PIPELINE_EXIT_CODE > {shlex.quote(str(note))}")
    assert outcome.code == 3 and note.read_text() == "3\n"
    assert outcome.err.index("b.yaml will fail") < outcome.err.index("run 1 of 3")
    done, failed, last, total = outcome.out.splitlines()
    assert "a.yaml: done" in done and "c.yaml: done" in last and total == "2 of 3 runs done"
    assert "b.yaml: failed (exit code 3)" in failed and "content: no such file" in failed
    assert read_picture(tmp_path / "c.png").shape[1] == 64
    shutil.copy(tmp_path / "content.png", tmp_path / "gone.png")
    records = journal(tmp_path / "a.run")
    outcome = call("run", *paths)
    assert outcome.code == 0 and outcome.out.endswith("3 of 3 runs done\n")
    assert journal(tmp_path / "a.run") == records  # finished ones are not rendered again


def test_a_stopped_queue_stops_and_resumes(tmp_path):
    """Ctrl-C is meant for the whole queue; nothing that was rendered may be lost."""
    import threading

    a, b, c = queue_of(tmp_path)
    stop = threading.Event()
    ended = run_queue([a, c, b], sink=lambda event: stop.set() if isinstance(event, IterationDone) else None, stop=stop)
    assert [one.exit_code for one in ended] == [75, None, None] and exit_code_of(ended) == 75
    started: list[str] = []
    iterations: list[int] = []

    def sink(event: object) -> None:
        if isinstance(event, QueuedRunStarted):
            started.append(event.config)
        elif isinstance(event, IterationDone) and len(started) == 1:
            iterations.append(event.iteration)

    ended = run_queue([a, c, b], sink=sink)
    assert [one.exit_code for one in ended] == [0, 0, 3] and exit_code_of(ended) == 3
    assert started == [str(a), str(c), str(b)] and iterations == [1]


def test_a_bug_in_one_run_leaves_the_others(tmp_path, call, monkeypatch):
    """Whatever happens to one picture, the next is begun."""
    from pipeline.commands import queue

    a, _, c = queue_of(tmp_path)
    real = queue.run
    monkeypatch.setattr(
        queue, "run", lambda config, **options: 1 / 0 if config.output.stem == "a" else real(config, **options)
    )
    outcome = call("run", a, c)
    assert outcome.code == 1 and "ZeroDivisionError" in outcome.err and (tmp_path / "c.png").exists()
    assert "a.yaml: failed (exit code 1): ZeroDivisionError" in outcome.out


def test_on_finish_runs_after_a_failure_and_not_after_ctrl_c(tmp_path, call):
    """It may switch the machine off: not while somebody stops the run to change it."""
    note = tmp_path / "note"
    command = ["--on-finish", f"echo $PIPELINE_EXIT_CODE >> {shlex.quote(str(note))}; exit 9"]
    config = write_run(tmp_path, optimizer={"max_iterations": 10_000})
    outcome = call("run", config, *command, "--set", "size=8")
    assert outcome.code == 3 and note.read_text() == "3\n" and "--on-finish ended with 9" in outcome.err
    terminal = Terminal(60, PIPELINE, "run", config, *command)
    terminal.wait_until(lambda screen: any("/10000" in bar for bar in screen.bars))
    terminal.type(b"\x03")
    assert terminal.wait() == 75 and note.read_text() == "3\n"


def test_a_dumb_terminal_gets_plain_text(images):
    """TERM=dumb, as in an editor: no sequence that it would print."""
    environment = ["env", "TERM=dumb", "COLUMNS=60", "OMP_NUM_THREADS=1"]
    command = ["script", "-qec", shlex.join([*environment, str(PIPELINE), *LINE]), "/dev/null"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "\x1b" not in shown and "stage 1 of" in shown and "done in" in shown


def test_completion_offers_commands_options_and_files():
    """The script of the documentation must work with this program."""
    environment = {
        "_PIPELINE_COMPLETE": "bash_complete",
        "COMP_WORDS": "pipeline run --on",
        "COMP_CWORD": "2",
        "PATH": "/usr/bin",
    }
    shown = subprocess.run([PIPELINE], env=environment, capture_output=True, text=True, check=True).stdout
    assert shown == "plain,--on-finish\n"
    script = subprocess.run(
        [PIPELINE], env={**environment, "_PIPELINE_COMPLETE": "zsh_source"}, capture_output=True, text=True, check=True
    )
    assert "#compdef pipeline" in script.stdout
