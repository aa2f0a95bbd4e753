"""Log lines that say whose they are: the run and the role of the process that wrote them."""

from __future__ import annotations

import logging
import os
import sys

from kat_ray.observability.redact import RedactingFormatter

ROLE_VARIABLE = "KAT_RAY_ROLE"
RUN_VARIABLE = "KAT_RAY_RUN"


def labels(run: str, role: str) -> dict[str, str]:
    """Environment of an actor's process whose log lines are to say whose they are."""
    return {RUN_VARIABLE: run, ROLE_VARIABLE: role, "VLLM_LOGGING_PREFIX": f"[{run} {role}] "}


def line_format(run: str, role: str) -> str:
    """Format of a log line of this run and role."""
    return f"%(asctime)s %(levelname)s [{run} {role}] %(name)s: %(message)s"


def label_logs() -> None:
    """Have an actor's process log to standard error, which Ray keeps by process; elsewhere nothing is done."""
    role = os.environ.get(ROLE_VARIABLE)
    log = logging.getLogger("kat_ray")
    if role is None or log.handlers:
        return
    handler = logging.StreamHandler()
    handler.setFormatter(RedactingFormatter(line_format(os.environ.get(RUN_VARIABLE, "-"), role)))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False


class _StandardError(logging.StreamHandler):
    """Whatever is standard error when a line is written.

    While a live line is shown, that stands in for the terminal and puts a log line above it. It writes to standard
    output, though: a standard error that goes elsewhere keeps its lines.
    """

    def emit(self, record: logging.LogRecord) -> None:
        terminal = getattr(sys.stderr, "rich_proxied_file", sys.stderr)
        self.stream = sys.stderr if terminal.isatty() else terminal
        super().emit(record)


def log_to_terminal(level: int) -> None:
    """Have the driver's process log to standard error, from this level on."""
    root = logging.getLogger()
    if not _terminals():
        root.addHandler(_StandardError())
    for handler in _terminals():
        handler.setLevel(level)  # not on the logger: a run's own log takes everything
    name_driver()


def name_driver(run: str = "-") -> None:
    """Have the driver's lines on standard error name this run; outside of one they name none."""
    for handler in _terminals():
        handler.setFormatter(RedactingFormatter(line_format(run, "driver")))


def _terminals() -> list[_StandardError]:
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, _StandardError)]
