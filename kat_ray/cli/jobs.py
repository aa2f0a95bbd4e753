"""The commands that talk to a cluster: `kat-ray submit | status | logs | stop | list`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kat_ray.cli.help import ABOUT_JOB, OVERRIDES

if TYPE_CHECKING:
    from rich.console import Console

    from kat_ray.cli.checks import ClusterSeen

_STOP_SECONDS = 600.0


def add_jobs(add: Callable[..., argparse.ArgumentParser]) -> list[argparse.ArgumentParser]:
    """Add the commands; returns those that take a configuration's overrides."""
    submit = add("submit", _submit, "submit a run to a Ray cluster as a job, and follow it", OVERRIDES)
    submit.add_argument("config", metavar="CONFIG", help="YAML file in the working tree, or `demo`")
    submit.add_argument(
        "--working-dir", metavar="DIR", type=Path, default=Path(), help="the folder to upload (default: this one)"
    )
    submit.add_argument(
        "--dry-run", action="store_true", help="show every file that would be uploaded; ask and send nothing"
    )
    submit.add_argument("--no-wait", action="store_true", help="do not follow the job")
    status = add("status", _status, "show a job's state and last step", ABOUT_JOB)
    logs = add("logs", _logs, "print a job's log", ABOUT_JOB)
    logs.add_argument(
        "-f", "--follow", action="store_true", help="keep printing until the job ends, and return its exit code"
    )
    stop = add("stop", _stop, "end a job; its run writes a checkpoint first", ABOUT_JOB)
    for sub in (status, logs, stop):
        sub.add_argument("name", metavar="NAME", help="a job's id, or a run's name")
    listing = add("list", _list, "list a cluster's jobs", "The cluster is reached through its dashboard.")
    for sub in (submit, status, logs, stop, listing):
        add_address(sub)
    return [submit]


def add_address(sub: argparse.ArgumentParser) -> None:
    """Add the option that says where the cluster is."""
    sub.add_argument(
        "--address", metavar="URL",
        help="the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, else http://127.0.0.1:8265)",
    )  # fmt: skip


def _jobs(address: str | None) -> Any:
    from actors.ray_jobs.client import Jobs, address_of

    return Jobs(address_of(address))


def cluster_seen(address: str | None, autoscaled: bool) -> ClusterSeen:
    """What the cluster whose dashboard is there has."""
    from kat_ray.cli.checks import ClusterSeen
    from kat_ray.cluster.roles import Node

    jobs = _jobs(address)
    nodes = [
        Node(
            f"{n.node_name or n.node_ip} ({n.node_id[:8]}{', head' if n.is_head_node else ''})",
            n.resources_total,
            n.labels or {},
        )
        for n in jobs.nodes()
    ]
    return ClusterSeen(jobs.ray_version, nodes, autoscaled)


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False)


def _submit(args: argparse.Namespace) -> int:
    from actors.ray_jobs.commands import show_upload, submit, train_command
    from kat_ray.config.load import load_config
    from kat_ray.errors import UserError

    folder: Path = args.working_dir
    if not folder.is_dir():
        raise UserError(f"--working-dir {folder}: not a directory")
    config = load_config(args.config, args.overrides)
    if args.dry_run:
        return show_upload(config, args.config, args.overrides, folder, _console())
    train_command(config, args.config, args.overrides, folder)  # before the cluster is asked for anything
    return submit(
        _jobs(args.address), config, args.config, args.overrides, folder, wait=not args.no_wait, console=_console()
    )


def _status(args: argparse.Namespace) -> int:
    from actors.ray_jobs.commands import show_status

    return show_status(_jobs(args.address), args.name, _console())


def _logs(args: argparse.Namespace) -> int:
    from actors.ray_jobs.commands import show_logs

    return show_logs(_jobs(args.address), args.name, _console(), args.follow)


def _stop(args: argparse.Namespace) -> int:
    from actors.ray_jobs.commands import stop

    return stop(_jobs(args.address), args.name, _console(), _STOP_SECONDS)


def _list(args: argparse.Namespace) -> int:
    from actors.ray_jobs.commands import show_list

    show_list(_jobs(args.address), _console())
    return 0
