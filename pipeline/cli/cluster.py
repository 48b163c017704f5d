"""The `scheduler` and `worker` commands."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import click

from pipeline.cli.working import EXIT_CODES, raise_if_stopped, working

_DEVICE = re.compile(r"cpu|cuda:[0-9]{1,3}")


@click.command(epilog=EXIT_CODES)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--host", metavar="ADDRESS", help="Address to listen at; default all of this machine.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, metavar="N", help="Port; default any free one.")
def scheduler(folder: Path, host: str | None, port: int) -> None:
    """Start the scheduler of a cluster, until Ctrl-C.

    FOLDER, on the file system that the machines share, gets the scheduler's address (scheduler.json) and the key of the
    cluster (cluster.pem): `pipeline worker FOLDER` on every machine, and `compute.scheduler: FOLDER` in a config. All
    connections are encrypted, and only processes with the key are served.
    """
    with working("plain") as (_sink, stop):
        from pipeline.commands.cluster import serve_scheduler  # noqa: PLC0415 - slow

        raise_if_stopped(stop)

        def ready(address: str, file: Path) -> None:
            click.echo(f"{address}  {file}")
            sys.stdout.flush()

        serve_scheduler(folder.absolute(), host=host, port=port, on_ready=ready, stop=stop)


@click.command(epilog=EXIT_CODES)
@click.argument("scheduler")
@click.option("--key", type=click.Path(path_type=Path), help="Key of the cluster; default beside its scheduler file.")
@click.option("--devices", metavar="LIST", help="Such as cuda:0,cuda:1 or cpu,cpu; default all GPUs, or the CPU.")
@click.option("--processes", type=click.IntRange(0, 256), metavar="N", help="Processes that only update.")
def worker(scheduler: str, key: Path | None, devices: str | None, processes: int | None) -> None:
    """Compute for a cluster on this machine, until Ctrl-C or TERM.

    SCHEDULER is the folder or the file of a scheduler, or its address. Workers may come and go while a run computes; a
    process that dies is replaced, and all return when the scheduler does.
    """
    names = [name.strip() for name in devices.split(",")] if devices else []
    if unknown := [name for name in names if not _DEVICE.fullmatch(name)]:
        raise click.UsageError(f"--devices: {unknown[0]!r} is no device; expected a list such as cuda:0,cuda:1 or cpu")
    where = scheduler if re.match(r"[a-z]+://", scheduler) else Path(scheduler).absolute()
    with working("plain") as (sink, stop):
        from pipeline.commands.cluster import serve_workers  # noqa: PLC0415 - slow

        raise_if_stopped(stop)
        serve_workers(where, key=key and key.absolute(), devices=names, processes=processes, sink=sink, stop=stop)
