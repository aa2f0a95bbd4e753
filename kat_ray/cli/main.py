"""The command line: `kat-ray train | eval | compare | submit | replay | report | doctor | bench | config` and
others.

Commands import what they need when they run, so that `--help` and mistakes in a configuration answer at once.
"""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import secrets
import sys
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import TYPE_CHECKING

from kat_ray.cli import jobs as cli_jobs
from kat_ray.cli.arguments import is_override, path_of, records_of, run_of
from kat_ray.cli.help import ABOUT_EVAL, DESCRIPTION, EXAMPLES, EXIT_CODES, OVERRIDES
from kat_ray.cli.interpreter import missing
from kat_ray.cli.records import add_records
from kat_ray.cli.serve_teacher import add_serve_teacher
from kat_ray.errors import EngineLost, Stopped, UserError
from kat_ray.observability.logs import log_to_terminal
from kat_ray.observability.redact import redact
from kat_ray.storage.address import Address, Place

if TYPE_CHECKING:
    from kat_ray.config import Config


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    args = _parse(sys.argv[1:] if argv is None else argv)
    log_to_terminal(logging.INFO if args.verbose else logging.WARNING)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        code = command(args)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _complain(str(error))
    except ModuleNotFoundError as error:
        if (said := missing(error)) is None:
            raise
        return _complain(said)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.code
    except EngineLost as lost:
        print(f"error: {lost}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has gone, as in `kat-ray config demo | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        return _complain(
            f"the disk is full ({error.filename or 'see run.dir'}): free some space, or choose another run.dir"
        )


def _complain(message: str) -> int:
    for line in redact(message).splitlines():
        print(f"error: {line}", file=sys.stderr)
    return 2


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # argparse takes no more positionals once an option stood between them: `eval DIR --json evaluation.k=8`.
    late = [a for a in rest if "=" in a and not a.startswith("-")]
    if unknown := [a for a in rest if a not in late]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if late:
        args.overrides = [*getattr(args, "overrides", []), *late]
    return args


def help_texts() -> dict[str, str]:
    """What `--help` says: of `kat-ray`, and of each of its commands."""
    parser = _parser()
    (commands,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
    return {"kat-ray": parser.format_help()} | {f"kat-ray {n}": sub.format_help() for n, sub in commands.items()}


def _parser() -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="kat-ray", description=DESCRIPTION, epilog=f"{EXAMPLES['']}\n\n{EXIT_CODES}", formatter_class=style
    )
    parser.add_argument("--version", action="version", version=f"kat-ray {_version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")

    def add(
        name: str, command: Callable[[argparse.Namespace], int], summary: str, about: str = OVERRIDES
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.\n\n{about}",
            epilog=f"{EXAMPLES[name]}\n\n{EXIT_CODES}",
            formatter_class=style,
        )
        sub.set_defaults(command=command)
        sub.add_argument("-v", "--verbose", action="store_true", help="also log what is being done")
        return sub

    configured = [*_add_runs(add), *cli_jobs.add_jobs(add), *add_records(add)]
    add_serve_teacher(add)
    for sub in configured:
        sub.add_argument("overrides", metavar="section.field=value", nargs="*", default=[], help="override a field")
    return parser


def _add_runs(add: Callable[..., argparse.ArgumentParser]) -> list[argparse.ArgumentParser]:
    """Add what starts something; returns the commands that take a configuration's overrides."""
    train = add("train", _train, "distil the teacher into the student")
    train.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file, or `demo`")
    train.add_argument(
        "--resume", metavar="RUN", type=run_of, help="resume this run from its newest good checkpoint"
    )
    train.add_argument(
        "--profile",
        action="store_true",
        help="write timeline.json, a Chrome trace of all actors (run.profile=true)",
    )
    evaluate = add("eval", _eval, "score a model on held-out problems", ABOUT_EVAL)
    evaluate.add_argument("model", metavar="RUN_OR_MODEL", help="run directory, model directory, or hub id")
    evaluate.add_argument("--config", metavar="CONFIG", help="YAML file, or `demo`; default: the run's own")
    evaluate.add_argument(
        "--data", metavar="SET", nargs="+", default=[],
        help="held-out sets, not the configuration's: gsm8k, math500, aime24, aime25, amc23, minerva, files, "
        "folders, hub ids",
    )  # fmt: skip
    evaluate.add_argument("--chat", action="store_true", help="apply the model's own chat template to the problems")
    evaluate.add_argument("--greedy", action="store_true", help="also one answer each with temperature 0")
    evaluate.add_argument("--json", action="store_true", help="print the result as one JSON object")
    doctor = add("doctor", _doctor, "check machine, packages, models and data")
    doctor.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file, or `demo`")
    doctor.add_argument(
        "--cluster",
        action="store_true",
        help="ask a cluster, not this machine, where each role would go (--address)",
    )
    doctor.add_argument(
        "--autoscaled", action="store_true", help="with --cluster: an autoscaler adds the nodes that are missing"
    )
    doctor.add_argument(
        "--agreement",
        action="store_true",
        help="start all engines instead, and compare the log-probabilities that they compute",
    )
    cli_jobs.add_address(doctor)
    compare = add("compare", _compare, "train with several rules and compare them")
    compare.add_argument("config", metavar="CONFIG", nargs="?", help="YAML file, or `demo`")
    compare.add_argument(
        "--runs", metavar="RUN", type=run_of, nargs="+", help="compare these finished runs; nothing is trained"
    )
    compare.add_argument(
        "--rules", metavar="RULE[:FIELD=VALUE,...]", nargs="+",
        help="rules to compare (default: none kat length_matched)",
    )  # fmt: skip
    compare.add_argument("--seeds", metavar="N", nargs="+", help="default: 0 1 2")
    compare.add_argument(
        "--evaluate-every", metavar="N",
        help="steps between evaluations along each run, which accuracy at equal tokens and TFLOP is taken from; 0: "
        "none (default: evaluation.every, or a tenth of the run with one answer to each problem where that is 0)",
    )  # fmt: skip
    compare.add_argument(
        "--out", metavar="DIR", type=path_of, help="folder of the comparison (default <run.dir>/compare-<run.name>)"
    )
    return [train, evaluate, doctor, compare]


def _version() -> str:
    try:
        return metadata.version("kat-ray")
    except metadata.PackageNotFoundError:
        return "(run from its source, not installed)"


def _train(args: argparse.Namespace) -> int:
    from kat_ray.config.load import load_config
    from kat_ray.run.resume import finished_steps, resumed_config

    overrides = [*args.overrides, *(["run.profile=true"] if args.profile else [])]
    args.resume = _found(args.resume)
    if args.resume is None:
        if args.config is None:
            raise UserError("name a configuration file, or `demo`; or a run to resume: --resume RUN")
        config = load_config(args.config, overrides)
    else:
        if args.config is not None and "=" not in args.config:
            raise UserError(f"{args.config}: --resume takes the run's own configuration; leave this one out")
        config = resumed_config(args.resume, [*([args.config] if args.config else []), *overrides])
        if (done := finished_steps(args.resume)) >= config.run.steps:
            print(f"{args.resume}: all {done} steps are done; a larger run.steps=N adds more")
            return 0
    from kat_ray.cluster.versions import skew

    _reach(config)
    for note in skew(os.environ):
        logging.getLogger("kat_ray.cli").warning(note)
    from actors.driver.train import train

    train(config, args.resume)
    return 0


def _found(run: Place | None) -> Place | None:
    """The run that is to be resumed, without links."""
    from kat_ray.run.stored_copy import resolved

    return resolved(run) if isinstance(run, Address) else run.resolve() if run else None


def _reach(config: Config) -> None:
    """`UserError` now, before models are loaded, for a cluster that cannot be joined."""
    _keep_others_out(config)
    from actors.cluster.preflight import check_cluster

    check_cluster(config)


def _keep_others_out(config: Config) -> None:
    """Give a local Ray a token of its own: every user of the machine reaches its ports, and can run code there.

    Ray reads the mode when it is imported. A mode that the user has set stays.
    """
    from kat_ray.cluster.auth import choose_mode

    if config.cluster.address or os.environ.get("RAY_ADDRESS"):
        choose_mode(os.environ)
    elif "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _eval(args: argparse.Namespace) -> int:
    from kat_ray.cli.evaluate import Asked, check_files, configuration, stored_model, table
    from kat_ray.cli.export import whole_model

    sets = [name for name in args.data if not is_override(name)]  # --data takes what follows, overrides too
    more = [*args.overrides, *filter(is_override, args.data)]
    source, given = stored_model(args.model, args.config)
    config, model = configuration(Asked(source, given, sets, args.chat, args.greedy, more))
    if config.evaluation.data is None:
        raise UserError(
            "evaluation.data = null: name the held-out problems with --data, or for example "
            "evaluation.data.path=demo:heldout"
        )
    check_files(config)
    _reach(config)
    from actors.driver.train import evaluate_model
    from kat_ray.run.summary import evaluation_fields

    with whole_model(model) as directory:
        result = evaluate_model(config, directory)
    if args.json:
        print(json.dumps({"model": model, **(evaluation_fields(result) or {})}))
    else:
        print(f"{model}\n{table(config, result)}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from kat_ray.cli import doctor
    from kat_ray.config.load import load_config

    config = load_config(args.config, args.overrides) if args.config else None
    cluster = None
    if args.cluster:
        if config is None:
            raise UserError("--cluster: name a configuration file, or `demo`, whose roles are to be placed")
        cluster = cli_jobs.cluster_seen(args.address, args.autoscaled)
    elif args.autoscaled:
        raise UserError("--autoscaled: describes a cluster; give --cluster as well")
    if args.agreement:
        if config is None or args.cluster:
            raise UserError("--agreement: name a configuration file, or `demo`, without --cluster")
        _reach(config)
        return doctor.report(doctor.agreement(config), _say)
    return doctor.run(config, _say, cluster)


def _say(text: str) -> None:
    print(text, flush=True)


def _compare(args: argparse.Namespace) -> int:
    from kat_ray.cli.compare import plan, run, show_finished

    if args.runs:
        given = {"--rules": args.rules, "--seeds": args.seeds, "--evaluate-every": args.evaluate_every}
        others = [*filter(None, [args.config]), *(name for name, value in given.items() if value is not None)]
        others += args.overrides
        show_finished([records_of(run) for run in args.runs], others, args.out, _say)
        return 0
    comparison = plan(args.config, args.overrides, args.rules, args.seeds, args.out, args.evaluate_every)
    _reach(comparison.config)
    from actors.driver.train import train

    run(comparison, train, _say)
    return 0
