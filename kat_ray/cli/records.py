"""`kat-ray replay | report | watch | track | bench | export | config`: what starts no run of its own."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from kat_ray.cli.arguments import count_of, is_override, path_of, records_of, run_of, share_of
from kat_ray.cli.help import (
    ABOUT_BENCH,
    ABOUT_DATA,
    ABOUT_EXPORT,
    ABOUT_REPORT,
    ABOUT_TRACK,
    ABOUT_WATCH,
    OVER_A_RUN,
)
from kat_ray.errors import UserError
from kat_ray.storage.address import Address, Place

SERVICES = ("wandb", "mlflow", "trackio", "swanlab")  # trackers that are packages of their own


def add_records(add: Callable[..., argparse.ArgumentParser]) -> list[argparse.ArgumentParser]:
    """Add the commands; returns those that take a configuration's overrides."""
    _add_replay(add)
    report = add("report", _report, "write a run's report: one page with pictures and its rollouts", ABOUT_REPORT)
    report.add_argument("run", metavar="RUN", type=run_of, help="run directory, such as runs/latest")
    report.add_argument(
        "settings", metavar="RUN | FIELD=VALUE", nargs="*", default=[],
        help="more runs, to see them side by side; or a setting of the rule that divides rollouts",
    )  # fmt: skip
    report.add_argument(
        "--rollouts", metavar="N", type=count_of, default=300, help="rollouts to show in the page (default 300)"
    )
    report.add_argument(
        "--gradients", metavar="CHECKPOINT", type=path_of, nargs="*",
        help="also compare the stages' gradients with the update from the student before training to the "
        "newest checkpoint, or between the two checkpoints named",
    )  # fmt: skip
    report.add_argument("--out", metavar="DIR", type=path_of, help="where report.html goes (default RUN/report)")
    _add_watch(add)
    _add_track(add)
    bench = add("bench", _bench, "measure the pipeline against its peer and the machine", ABOUT_BENCH)
    bench.add_argument("--only", metavar="GROUP", nargs="+", default=[], help="only these groups")
    bench.add_argument(
        "--out",
        metavar="DIR",
        type=path_of,
        default=Path("docs"),
        help="where benchmarks.md and .json go (default docs)",
    )
    bench.add_argument(
        "--work",
        metavar="DIR",
        type=path_of,
        default=Path("runs/bench"),
        help="models and logs (default runs/bench)",
    )
    _add_export(add)
    data = add("data", _data, "show what the model will see of a data set", ABOUT_DATA)
    data.add_argument(
        "source", metavar="DATA_OR_CONFIG", nargs="?", help="a data set, a YAML file, `demo`, or a run"
    )
    data.add_argument("--model", metavar="MODEL", help="whose tokenizer reads it (default: the configuration's)")
    data.add_argument(
        "--heldout", metavar="NAME", nargs="?", const="",
        help="held-out problems: those of evaluation.data, or the set of evaluation.sets with this name",
    )  # fmt: skip
    data.add_argument("--prompts", metavar="N", type=count_of, default=3, help="prompts to show (default 3)")
    config = add("config", _config, "print the resolved configuration")
    config.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file, or `demo`")
    config.add_argument("--docs", action="store_true", help="print the text of docs/configuration.md instead")
    return [data, config]


def _add_watch(add: Callable[..., argparse.ArgumentParser]) -> None:
    watch = add("watch", _watch, "show a run on one screen while it goes on", ABOUT_WATCH)
    watch.add_argument("run", metavar="RUN", help="run directory, such as runs/latest; with --address a job")
    watch.add_argument("--once", action="store_true", help="print one frame, as where there is no terminal")
    watch.add_argument(
        "--address", metavar="URL", help="the dashboard of a cluster: RUN is a job's id there, or its run's name"
    )


def _add_track(add: Callable[..., argparse.ArgumentParser]) -> None:
    track = add("track", _track, "tell trackers what a run has recorded", ABOUT_TRACK)
    track.add_argument("run", metavar="RUN", type=run_of, help="run directory, such as runs/latest")
    track.add_argument(
        "--to", metavar="TRACKER", nargs="+", choices=SERVICES, help="which (default: those of tracking.to)"
    )
    track.add_argument("--project", help="the project that the run is shown in (default: tracking.project)")
    track.add_argument(
        "--online", action="store_true", help="to their services, whose addresses and accounts the environment has"
    )


def _add_replay(add: Callable[..., argparse.ArgumentParser]) -> None:
    replay = add("replay", _replay, "apply other settings of the rule to a run's recorded rollouts", OVER_A_RUN)
    replay.add_argument("run", metavar="RUN", type=run_of, help="run directory, such as runs/latest")
    replay.add_argument(
        "settings", metavar="FIELD=VALUE", nargs="*", default=[], help="a setting of the rule; a list sweeps it"
    )
    replay.add_argument(
        "--rule", metavar="RULE", help="the rule to apply (default: the run's own if it is a KAT rule, else kat)"
    )
    replay.add_argument(
        "--budget", metavar="SHARE", type=share_of,
        help="recommend the cheapest setting whose cuts lose no more than this share of a rollout's KL on average "
        "(default: the rule's own budget, or 0.02)",
    )  # fmt: skip
    replay.add_argument(
        "--objective",
        action="store_true",
        help="replay what was learnt from rewards instead: a FIELD is then one of objective.rl",
    )
    replay.add_argument("--keep-kl", dest="keep_kl", type=share_of, help=argparse.SUPPRESS)  # the name before 0.2
    replay.add_argument(
        "--out", metavar="DIR", type=path_of, help="where replay.csv and replay.png go (default RUN/replay)"
    )


def _add_export(add: Callable[..., argparse.ArgumentParser]) -> None:
    export = add("export", _export, "write a run's model for others, into a folder or to the hub", ABOUT_EXPORT)
    export.add_argument(
        "source", metavar="RUN_OR_CHECKPOINT", type=run_of, help="its newest checkpoint, or this one"
    )
    export.add_argument("out", metavar="DIR", nargs="?", help="the same as --to DIR")
    export.add_argument("--to", metavar="TARGET", help="a folder, or hub:owner/name")
    export.add_argument(
        "--adapter", action="store_true", help="the adapters alone, of a run with learner.lora (default: merged)"
    )
    export.add_argument("--base", metavar="MODEL", help="the student before training, if it is not where it was")
    export.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: the learner's)"
    )
    export.add_argument("--overwrite", action="store_true", help="replace a model that is there already")
    export.add_argument("--private", action="store_true", help="a repository that is made is private")


def _replay(args: argparse.Namespace) -> int:
    from kat_ray.cli.replay import replay
    from kat_ray.cli.replay_objective import replay_objective

    settings = [*args.settings, *getattr(args, "overrides", [])]
    args.run = records_of(args.run)
    if args.objective:
        given = {"--rule": args.rule, "--budget": args.budget or args.keep_kl}
        if other := next((name for name, value in given.items() if value is not None), None):
            raise UserError(f"{other}: is of a termination rule; leave it out, or --objective")
        replay_objective(args.run, settings, args.out)
        return 0
    budget = args.budget if args.keep_kl is None else 1.0 - args.keep_kl
    replay(args.run, args.rule, settings, budget, args.out)
    return 0


def _report(args: argparse.Namespace) -> int:
    from kat_ray.cli.replay import rule_with
    from kat_ray.config.load import usable_path
    from kat_ray.config.local_paths import is_bucket_url
    from kat_ray.report.command import report

    settings = [*args.settings, *getattr(args, "overrides", [])]
    if isinstance(args.run, Address) and args.gradients is not None:
        raise UserError(f"--gradients: reads checkpoints of a run in a folder; copy {args.run} into one first")
    args.run = records_of(args.run)
    stored = [text for text in settings if is_bucket_url(text)]
    settings = [text for text in settings if text not in stored]
    runs = [text for text in settings if "=" not in text or (usable_path(text) / "config.yaml").is_file()]
    if wrong := next((text for text in runs if not usable_path(text).is_dir()), None):
        raise UserError(f"{wrong}: no such run directory, and no setting, which is FIELD=VALUE")
    more = [*map(usable_path, runs), *(records_of(Address.of(text)) for text in stored)]
    settings = [text for text in settings if text not in runs]
    if more:
        return _side_by_side(args, more, settings)
    rule = rule_with(args.run, settings) if settings else None
    report(
        args.run,
        rule,
        out=args.out,
        rollouts=args.rollouts,
        gradients=args.gradients,
        say=lambda text: print(text, flush=True),
    )
    return 0


def _side_by_side(args: argparse.Namespace, more: list[Path], settings: list[str]) -> int:
    from kat_ray.report.side_by_side import side_by_side

    others = [*settings, *(["--gradients"] if args.gradients is not None else [])]
    if others:
        raise UserError(f"{others[0]}: is for the report of one run; leave it out, or name one run")
    side_by_side([args.run, *more], args.out, lambda text: print(text, flush=True))
    return 0


def _watch(args: argparse.Namespace) -> int:
    from rich.console import Console

    from kat_ray.config.local_paths import is_bucket_url
    from kat_ray.watch.command import stored_view, watch, watch_run

    console = Console(highlight=False)
    if args.address is None and is_bucket_url(args.run):
        return watch(stored_view(Address.of(args.run)), console, args.once, seconds=5.0)
    if args.address is None:
        return watch_run(path_of(args.run), console, args.once)
    from actors.ray_jobs.client import Jobs, address_of
    from actors.ray_jobs.commands import view_of

    jobs = Jobs(address_of(args.address))
    return watch(lambda: view_of(jobs, args.run), console, args.once, seconds=3.0)


def _track(args: argparse.Namespace) -> int:
    from kat_ray.config.load import load_config
    from kat_ray.run.resume import run_config
    from kat_ray.tracking.choice import check_trackers, tell_again

    if isinstance(args.run, Address):
        raise UserError(
            f"{args.run}: what was told is kept beside a run's records; copy the run into a folder, and name that"
        )
    configured = run_config(args.run)
    names = args.to or [name for name in configured.trackers if name in SERVICES]
    if not names:
        raise UserError(f"{args.run}: its tracking.to names none of {', '.join(SERVICES)}; name one with --to")
    overrides = [f"tracking.to=[{', '.join(names)}]", *(["tracking.online=true"] if args.online else [])]
    overrides += [f"tracking.project={args.project}"] if args.project else []
    tracking = load_config(args.run / "config.yaml", overrides).tracking
    check_trackers(tracking, tracking.to)
    return 0 if tell_again(args.run, tracking, tracking.to, lambda text: print(text, flush=True)) else 1


def _bench(args: argparse.Namespace) -> int:
    from actors.bench.command import bench

    for file in bench(args.only, args.out, args.work.resolve(), lambda text: print(text, flush=True)):
        print(file)
    return 0


def _export(args: argparse.Namespace) -> int:
    from kat_ray.cli.export import Options, export

    if (args.out is None) == (args.to is None):
        raise UserError("name one place for the model: --to DIR, or --to hub:owner/name")
    options = Options(args.base, args.dtype, args.adapter, args.overwrite, args.private)
    for line in export(_model_of(args.source), args.to or args.out, options):
        print(line)
    return 0


def _model_of(source: Place) -> Path:
    """A run or checkpoint; of one in a bucket a folder with its model."""
    from kat_ray.run.stored_copy import copied_model, resolved

    return copied_model(resolved(source)) if isinstance(source, Address) else source


def _data(args: argparse.Namespace) -> int:
    from kat_ray.cli.data import run

    source, heldout, overrides = args.source, args.heldout, list(args.overrides)
    if heldout and "=" in heldout:  # --heldout takes what follows, an override too
        heldout, overrides = "", [*overrides, heldout]
    if heldout and (source is None or is_override(source)):  # or what is to be shown
        source, heldout, overrides = heldout, "", [*filter(None, [source]), *overrides]
    if source is None:
        raise UserError("name a data set, a YAML file, `demo`, or a run")
    return run(source, args.model, heldout, args.prompts, overrides)


def _config(args: argparse.Namespace) -> int:
    if args.docs:
        from kat_ray.config.schema import configuration_markdown

        print(configuration_markdown(), end="")
        return 0
    if args.config is None:
        raise UserError("name a configuration file, or `demo`; --docs prints the list of fields")
    from kat_ray.config.load import config_yaml, load_config

    print(config_yaml(load_config(args.config, args.overrides)), end="")
    return 0
