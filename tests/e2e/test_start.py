"""Ctrl-C, TERM and HUP at any time between the start and the end of the process; and `python -m pipeline`.

The signals are sent at imports, of which the slow part of the start consists: there are hundreds, at exact moments.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.e2e import PIPELINE, TIMEOUT_S, read_picture, write_run
from tests.support.terminal import Terminal

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
STOPPING = "stopping after the tiles in flight; interrupt again to abort"
LINE = "pipeline: Stopped. Run the same command again to resume.\n"

# The command of the arguments, which sends itself a signal at the import with a number, the first of our own being 0,
# or at the interpreter's very end; prints how many imports there were.
AT_AN_IMPORT = """
import os, signal, sys

seen = -1

def hook(event, args, kill=os.kill, pid=os.getpid(), moment=sys.argv[1], number=int(sys.argv[2]), write=os.write):
    global seen
    if event == "import" and (seen >= 0 or args[0] == "pipeline.cli.app"):
        seen += 1
        if moment == str(seen):
            kill(pid, number)
    elif event == "cpython.PyInterpreterState_Clear":
        write(1, f"imports: {seen}\\n".encode())
        if moment == "end":
            kill(pid, number)

sys.argv = ["pipeline", *sys.argv[3:]]
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
sys.addaudithook(hook)
from pipeline.__main__ import main
main()
"""


def run_with(moment: int | str, number: int, *argv: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", AT_AN_IMPORT, str(moment), str(int(number)), *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, env=environment)


def imports_of(done: subprocess.CompletedProcess[str]) -> int:
    return int(done.stdout.rpartition("imports: ")[2])


@pytest.mark.parametrize(
    "command",
    ["--help", "plan -c {}", "status -c {}", "export -c {} -o {}.png --force", "verify -c {}", "init -", "doctor"],
)
def test_a_signal_in_the_first_seconds_prints_one_line(tmp_path, call, command):
    """Ctrl-C during the start prints one line instead of a traceback, and exits with 75."""
    config = write_run(tmp_path, (48, 36), optimizer={"max_iterations": 1})
    if "status" in command or "export" in command or "verify" in command:
        assert call("run", "-c", config).code == 0
    argv = [part.format(config) for part in command.split()]
    undisturbed = run_with("none", signal.SIGINT, *argv)
    assert undisturbed.returncode == 0, undisturbed.stderr
    for index, share in enumerate((0, 0.1, 0.3, 0.5, 0.8)):
        ended = run_with(int(imports_of(undisturbed) * share), SIGNALS[index % 3], *argv)
        assert ended.returncode == 75, ended.stderr
        assert ended.stderr.removeprefix(f"{STOPPING}\n") == LINE, ended.stderr


def test_a_signal_while_a_run_starts_begins_nothing(tmp_path):
    """A run that is interrupted during its start leaves no files behind."""
    config = write_run(tmp_path, (48, 36), optimizer={"max_iterations": 1})
    undisturbed = run_with("none", signal.SIGINT, "plan", "-c", config)
    files = sorted(tmp_path.rglob("*"))
    for index in range(8):
        moment = imports_of(undisturbed) * index // 8  # a plan imports less than a run before that begins
        ended = run_with(moment, SIGNALS[index % 3], "run", "-c", config, "--log-format", "json")
        assert ended.returncode == 75, ended.stderr
        assert ended.stderr.endswith(LINE)
        assert all(json.loads(line)["event"] == "Note" for line in ended.stderr.splitlines()[:-1])
        assert sorted(tmp_path.rglob("*")) == files


def test_a_signal_at_any_import_of_a_run_stops_it_and_it_resumes(tmp_path):
    """Torch is imported while a run is in progress."""
    config = write_run(tmp_path, (48, 36), optimizer={"max_iterations": 2})
    undisturbed = run_with("none", signal.SIGINT, "run", "-c", config, "--set", f"work_dir={tmp_path / 'undisturbed'}")
    assert undisturbed.returncode == 0
    picture = read_picture(tmp_path / "out.png")
    (tmp_path / "out.png").unlink()
    for index in range(4):
        moment = imports_of(undisturbed) * (index + 2) // 6
        ended = run_with(moment, SIGNALS[index % 3], "run", "-c", config)
        assert ended.returncode in (75, 0), ended.stderr
        assert "Traceback" not in ended.stderr
    assert run_with("none", signal.SIGINT, "run", "-c", config).returncode == 0
    assert (read_picture(tmp_path / "out.png") == picture).all()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_after_the_end_changes_no_exit_code(number):
    """Completed work must not look like a failure to a script."""
    ended = run_with("end", number, "--version")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert run_with("end", number, "plan").returncode == 2


@pytest.mark.parametrize("command", [[PIPELINE], [sys.executable, "-m", "pipeline"]], ids=["script", "module"])
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_to_a_real_process_as_soon_as_it_listens(command, number):
    """The same with a signal from another process, like a shell or a batch system."""
    default = ["env", *(f"--default-signal={name}" for name in ("INT", "TERM", "HUP"))]
    process = subprocess.Popen(
        [*default, *command, "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + TIMEOUT_S
    while not catches(process.pid, signal.SIGHUP):  # which we listen to last
        assert process.poll() is None and time.monotonic() < deadline
    process.send_signal(number)
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, err) == (75, LINE)


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return bool(int(status.get("SigCgt", "0"), 16) >> (number - 1) & 1)


def test_a_signal_that_is_ignored_stays_so_during_the_start():
    """nohup must work in the first seconds as well."""
    code = AT_AN_IMPORT.replace("signal.SIG_DFL)", "signal.SIG_IGN)")
    command = [sys.executable, "-c", code, "3", str(int(signal.SIGHUP)), "--version"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")


def test_ctrl_c_in_a_process_of_somebody_else_is_a_stop_as_well(call, monkeypatch):
    """A program that calls `cli.main` has Python's own SIGINT handler, and must get the same exit code."""
    from pipeline.cli import reports

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reports, "print_doctor", interrupted)
    outcome = call("doctor")
    assert outcome.code == 75
    assert outcome.err.strip() == LINE.strip()


def test_python_m_pipeline_is_the_command():
    """Works where the script is not on PATH."""
    helped = subprocess.run(
        [sys.executable, "-m", "pipeline", "--help"], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert (helped.returncode, helped.stderr) == (0, "")
    assert helped.stdout.startswith("Usage: ") and "preview" in helped.stdout
    wrong = subprocess.run([sys.executable, "-m", "pipeline", "rnu"], capture_output=True, check=False)
    assert wrong.returncode == 2


@pytest.mark.parametrize("log_format", ["auto", "plain", "json"])
def test_a_start_says_so_where_somebody_waits(tmp_path, call, log_format):
    """The slow imports would leave the terminal empty for seconds."""
    config = write_run(tmp_path, (48, 36), optimizer={"max_iterations": 1})
    first = "starting" if log_format != "json" else json.dumps({"event": "Note", "message": "starting"})
    terminal = Terminal(80, PIPELINE, "run", "-c", config, "--log-format", log_format)
    assert terminal.wait() == 0
    assert terminal.screen.shown[0] == first
    assert "starting" not in call("run", "-c", config, "--log-format", log_format).err  # no terminal here


def test_a_terminal_is_left_as_it_was_by_a_signal_during_the_start(tmp_path):
    """A signal during the start restores the cursor and removes the bars."""
    config = write_run(tmp_path, (48, 36), optimizer={"max_iterations": 1})
    imports = imports_of(run_with("none", signal.SIGINT, "plan", "-c", config))
    for index in range(5):
        arguments = (imports * index // 5, int(SIGNALS[index % 3]), "run", "-c", config)
        terminal = Terminal(80, sys.executable, "-c", AT_AN_IMPORT, *arguments)
        assert terminal.wait() == 75
        assert terminal.screen.cursor_shown and terminal.screen.bars == []
        lines = [line for line in terminal.screen.shown if not line.startswith(("starting", STOPPING, "imports: "))]
        assert lines == [LINE.strip()]
