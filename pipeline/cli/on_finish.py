"""`--on-finish`: a command that is run when a run or a queue has ended."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass

import click

from pipeline.core.errors import Stopped


@dataclass
class OnFinish:
    """The command of a run, if one was given, for the shell."""

    command: str | None = None

    def __call__(self, code: int) -> None:
        """Run the command with the exit code in PIPELINE_EXIT_CODE, unless the run was stopped: it is not finished."""
        if self.command is None or code == Stopped.exit_code:
            return
        environment = {**os.environ, "PIPELINE_EXIT_CODE": str(code)}
        ended = subprocess.run(self.command, shell=True, check=False, env=environment)
        if ended.returncode:
            click.echo(f"pipeline: the command of --on-finish ended with {ended.returncode}", err=True)
