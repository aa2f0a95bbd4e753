"""What `kat-ray submit` uploads of a folder: found with Ray's own packager, listed, refused where it is too large.

Every node of the cluster, and whoever reaches its dashboard, can read what is uploaded. So it holds no secrets, as
far as names and first lines tell, and nothing that a run does not need.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kat_ray.config import Config
from kat_ray.errors import UserError

MIB = 2**20

# Patterns as in .gitignore.
SECRETS = (
    ".env*", "*.env", ".netrc", "_netrc", ".pgpass", ".my.cnf", ".pypirc", ".npmrc", ".git-credentials",
    ".htpasswd", ".vault-token", ".boto", ".s3cfg", ".dockercfg", ".docker", ".ssh", ".gnupg", ".aws", ".azure",
    ".kube", "kubeconfig*", "*.kubeconfig", "**/.config/gcloud", ".databrickscfg", ".kaggle", "id_rsa*",
    "id_dsa*", "id_ecdsa*", "id_ed25519*", "*.pem", "*.key", "*.ppk", "*.p12", "*.pfx", "*.jks", "*.kdbx",
    "credentials", "credentials*.json", "*credentials.json", "*service*account*.json", "client_secret*.json",
    "secrets.json", "secrets.toml", "secrets.y*ml", "*.tfstate*", "*.tfvars", "**/huggingface/token",
    "**/huggingface/stored_tokens", ".huggingface",
)  # fmt: skip
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth", "*.ckpt")
RECORDS = ("/runs", "/wandb", "/mlruns", ".cache")
_DEBRIS = (".git", ".venv*", "venv", "__pycache__", "*.pyc", ".*_cache", ".hypothesis", ".tox", "node_modules")
_DEMO = "kat_ray/demo/models"  # a working tree of this project is uploaded with the pair that `demo` trains

_KEY = re.compile(rb"\A\s*-----BEGIN [A-Z ]*PRIVATE KEY-----")
_KEY_IN_JSON = re.compile(rb"\"private_key\"\s*:\s*\"-----BEGIN")
_SNIFFED = 64 * 1024  # bytes: keys are small
_ENTRY = 128  # bytes of an archive that a file takes beside its content and, twice, its name
_NAMED = 3  # files that a message names

_PRIVATE, _LINKED = "may hold secrets", "links that lead out of the folder"
_WEIGHTS = "weights that no path of student or teachers names"
_ENVIRONMENTS, _RUNS = "virtual environments", "runs and caches"


@dataclass(frozen=True)
class Upload:
    """What goes to the cluster, and what does not."""

    folder: Path
    files: Mapping[str, int]  # bytes, by path below the folder
    left_out: Mapping[str, Sequence[str]]  # paths, by the reason
    excludes: Sequence[str]  # for Ray's packager, which takes the same files with them

    @property
    def archive_bytes(self) -> int:
        """Size of the archive that Ray makes of it, about: it does not compress."""
        return sum(size + 2 * len(name) + _ENTRY for name, size in self.files.items())

    def lines(self) -> Iterator[str]:
        """What a user should see before it goes."""
        size = sum(self.files.values())
        yield f"uploading {self.folder}: {len(self.files)} files, {_mib(size)}; the largest: {self._largest()}"
        for reason, paths in self.left_out.items():
            more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
            yield f"left out, {reason}: {', '.join(paths[:_NAMED])}{more}"

    def listing(self) -> Iterator[str]:
        """Every file with its size, the largest first."""
        for name, size in self._by_size():
            yield f"{size:>13,} bytes  {name}"

    def check_holds(self, source: str) -> None:
        """`UserError` where a file that the job reads, by its path below the folder, is left out."""
        if source not in self.files:
            raise UserError(
                f"{source}: is not uploaded: .gitignore, .rayignore or a name that secrets have leaves it out; "
                "give it another name or place"
            )

    def check_size(self, limit: int) -> None:
        """`UserError` where Ray's dashboard, which takes `limit` bytes, would refuse it."""
        if self.archive_bytes > limit:
            raise UserError(
                f"{self.folder}: {_mib(self.archive_bytes)} would be uploaded, Ray's dashboard takes {_mib(limit)}"
                f". The largest: {self._largest()}. Name what the run does not need in .gitignore or .rayignore, "
                "choose another folder with --working-dir, or put models and data on storage that all nodes share"
            )

    def _largest(self) -> str:
        return ", ".join(f"{name} ({_mib(size)})" for name, size in self._by_size()[:_NAMED]) or "nothing"

    def _by_size(self) -> list[tuple[str, int]]:
        return sorted(self.files.items(), key=lambda item: (-item[1], item[0]))


def plan_upload(folder: Path, config: Config) -> Upload:
    """Walk a folder as Ray's packager does, .gitignore and .rayignore included."""
    from ray._private.ray_constants import RAY_RUNTIME_ENV_IGNORE_GITIGNORE, get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel

    silence_packager()
    root = folder.resolve()
    weights = (*WEIGHTS, *(f"!/{_escaped(kept)}/**" for kept in _kept(root, config)))
    debris = (*_DEBRIS, *get_runtime_env_default_excludes())
    sieve = _Sieve(root, {_WEIGHTS: weights, _RUNS: RECORDS, _PRIVATE: SECRETS}, debris)
    files: dict[str, int] = {}

    def take(path: Path) -> None:
        name = path.relative_to(root).as_posix()
        if path.is_file() and not sieve.takes_key(path, name):
            files[name] = path.stat().st_size

    gitignore = os.environ.get(RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"  # as Ray's client has it
    try:
        _dir_travel(root, [sieve], take, include_gitignore=gitignore)
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be uploaded: {error.strerror or error}") from error
    # Ray has one list, whose last pattern that fits holds: what is kept of the weights may still be a secret.
    excludes = (*weights, *RECORDS, *debris, *SECRETS, *(f"/{_escaped(name)}" for name in sieve.found))
    return Upload(root, files, {k: v for k, v in sieve.left_out.items() if v}, excludes)


def silence_packager() -> None:
    """Ray's packager and websocket tell of each folder that they skip; `Upload.lines` says what matters.

    Ray sets these levels when it is imported, so this comes after.
    """
    for name in ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk"):
        logging.getLogger(name).setLevel(logging.ERROR)


def dashboard_limit() -> int:
    """Bytes that the dashboard of this release of Ray takes in one request."""
    from ray._private.ray_constants import DASHBOARD_CLIENT_MAX_SIZE

    return int(DASHBOARD_CLIENT_MAX_SIZE)


class _Sieve:
    """Whether a path is left out; remembers why, and of what only a look at it tells, where it is."""

    def __init__(self, root: Path, patterns: Mapping[str, Iterable[str]], debris: Iterable[str]) -> None:
        from ray._private.runtime_env.packaging import _get_excludes

        self.found: list[str] = []
        self.left_out: dict[str, list[str]] = {r: [] for r in (_PRIVATE, _LINKED, _WEIGHTS, _ENVIRONMENTS, _RUNS)}
        self._root = root
        self._match: dict[str, Callable[[Path], Any]] = {
            reason: _get_excludes(root, list(lines)) for reason, lines in patterns.items()
        }
        self._is_debris = _get_excludes(root, list(debris))

    def __call__(self, path: Path) -> bool:
        if path == self._root:
            return False
        if self._is_debris(path):
            return True
        name = path.relative_to(self._root).as_posix()
        reason = next((reason for reason, match in self._match.items() if match(path)), None)
        if reason is None:
            reason = self._seen(path)
            self.found += [name] if reason else []
        if reason is not None:
            self.left_out[reason].append(name)
        return reason is not None

    def _seen(self, path: Path) -> str | None:
        if path.is_symlink():
            target = path.resolve()
            if not target.is_relative_to(self._root):
                return _LINKED
            if self._match[_PRIVATE](target):
                return _PRIVATE
        if (path / "pyvenv.cfg").is_file():
            return _ENVIRONMENTS
        return _RUNS if (path / "config.yaml").is_file() and (path / "metrics.jsonl").is_file() else None

    def takes_key(self, path: Path, name: str) -> bool:
        """Whether a file is a private key, or the JSON file of a service account; if so it is left out."""
        if path.stat().st_size > _SNIFFED:
            return False
        content = path.read_bytes()
        private = bool(_KEY.match(content) or (path.suffix == ".json" and _KEY_IN_JSON.search(content)))
        if private:
            self.found.append(name)
            self.left_out[_PRIVATE].append(name)
        return private


def _kept(root: Path, config: Config) -> Iterator[str]:
    """Folders whose weights the job reads from what is uploaded."""
    teachers = [teacher.path for teacher in config.used_teachers.values()]
    for path in (_DEMO, config.student.path, *teachers):
        inside = os.path.normpath(root / path)
        if os.path.isdir(inside) and Path(inside).is_relative_to(root) and Path(inside) != root:
            yield Path(inside).relative_to(root).as_posix()


def _escaped(name: str) -> str:
    return re.sub(r"([\\*?\[\]!# ])", r"\\\1", name)


def _mib(size: int) -> str:
    return f"{size / MIB:.1f} MiB"
