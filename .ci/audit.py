"""Known holes in the packages of the locks, of both images and of the tools: `make audit`.

Exit code 1 where a locked version has an advisory that `.ci/audit-accepted` does not name, 0 where none has, and 0
with the words "not reachable" where no advisory service answers. An index that stands in for PyPI may know packages
and no advisories, which pip-audit reports as a clean bill: a service is believed only if it condemns a version that
is known to be bad.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
VENV = ROOT / ".venv-audit"
PIP_AUDIT = "pip-audit==2.10.1"
SERVICES = ("pypi", "osv")
KNOWN_BAD = "jinja2==2.4.1"
SECONDS = 600

Ask = Callable[[str, str], "dict[str, Any] | None"]


def ask(service: str, requirements: str) -> dict[str, Any] | None:
    """pip-audit's report on pinned requirements; None where the service does not answer."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(requirements)
        file.flush()
        command = [
            str(VENV / "bin" / "pip-audit"),
            "--disable-pip",
            "--no-deps",
            "--progress-spinner=off",
            "-f",
            "json",
        ]
        try:
            done = subprocess.run(
                [*command, "-s", service, "-r", file.name],
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
            report: dict[str, Any] = json.loads(done.stdout)
        except (subprocess.TimeoutExpired, json.JSONDecodeError):
            return None
    return report


def holes(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """(package and version, advisory, versions that mend it) of each finding."""
    return [
        (f"{package['name']} {package['version']}", hole["id"], ", ".join(hole["fix_versions"]) or "none")
        for package in report["dependencies"]
        for hole in package.get("vulns", ())
    ]


def audit(locks: dict[str, str], accepted: dict[str, str], ask: Ask, say: Callable[[str], object]) -> int:
    """Ask the first service that can be believed about each lock, name -> pins; returns the exit code."""
    code, waiting = 0, dict(locks)
    for service in SERVICES:
        if not waiting:
            break
        known_bad = ask(service, KNOWN_BAD + "\n")
        if known_bad is None or not holes(known_bad):
            say(f"dependency audit: {service} is not reachable, or knows no advisories")
            continue
        for lock, requirements in list(waiting.items()):
            report = ask(service, requirements)
            if report is None:
                say(f"dependency audit: {lock}: {service} stopped answering")
                break
            code = max(code, verdict(f"{lock}: {service}", report, accepted, say))
            del waiting[lock]
    if waiting:
        say(
            "dependency audit: not reachable: no advisory service answers from this machine; "
            f"not audited: {', '.join(waiting)}"
        )
    return code


def verdict(who: str, report: dict[str, Any], accepted: dict[str, str], say: Callable[[str], object]) -> int:
    """Say what a service found in a lock; 1 where that is open."""
    unknown = [p["name"] for p in report["dependencies"] if "skip_reason" in p]
    open_ = [hole for hole in holes(report) if hole[1] not in accepted]
    for package, advisory, mended in open_:
        say(f"dependency audit: {who}: {package}: {advisory}, mended in: {mended}")
    say(
        f"dependency audit: {who} has {len(open_)} open advisories on {len(report['dependencies'])} "
        "packages" + (f"; it does not know {', '.join(unknown)}" if unknown else "")
    )
    return 1 if open_ else 0


def accepted_in(text: str) -> dict[str, str]:
    """Advisory -> reason, of lines `ADVISORY reason`."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    pairs = (line.partition(" ") for line in lines if line)
    return {advisory: reason.strip() for advisory, _, reason in pairs}


def pinned(text: str) -> str:
    """The lock's requirements without comments and local version labels, which no advisory names."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return "".join(f"{line.split('+')[0]}\n" for line in lines if "==" in line)


def locks() -> dict[str, str]:
    """Name -> pins of what the images install, torch included, and of tools, trackers and stores beside them."""

    def runtime(*build: str) -> str:
        command = [str(ROOT / "docker" / "install.sh"), "--list", *build]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS).stdout

    files = {name: ROOT / "docker" / f"requirements-{name}.lock" for name in ("dev", "docs", "trackers", "buckets")}
    tools = {name: pinned(file.read_text(encoding="utf-8")) for name, file in files.items()}
    return {"cpu": pinned(runtime()), "gpu": pinned(runtime("--gpu")), **tools}


def main() -> int:
    """Install the auditor beside the project's environment, and audit the locks."""
    try:
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True, timeout=SECONDS)
        pip = [str(VENV / "bin" / "pip"), "install", "-q", "--disable-pip-version-check", PIP_AUDIT]
        subprocess.run(pip, check=True, timeout=SECONDS, capture_output=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        print(f"dependency audit: not reachable: {PIP_AUDIT} cannot be installed ({error}); nothing was audited")
        return 0
    accepted = accepted_in((ROOT / ".ci" / "audit-accepted").read_text(encoding="utf-8"))
    return audit(locks(), accepted, ask, lambda line: print(line, flush=True))


if __name__ == "__main__":
    sys.exit(main())
