"""A bucket, or what lies below a prefix of one, through fsspec: objects are written and read whole.

What is relied on is what S3, Google Cloud Storage and Azure Blob give alike: an object appears whole or not at
all; who reads or lists after a write was answered sees it; and of several who create one key, one succeeds.
There is no rename, nothing is appended to, and no order but that in which answers came.

Every request is tried again while the store does not answer, up to a bounded time. Libraries of the stores look
for credentials in the environment; none passes through here.
"""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from kat_ray.errors import UserError
from kat_ray.observability.redact import redact
from kat_ray.remote.retry import Retry
from kat_ray.storage.address import Address

log = logging.getLogger("kat_ray.storage")

T = TypeVar("T")

EXTRAS = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs"}  # by scheme, which is the extra's name too: fsspec's package
_NO_LISTINGS = {"use_listings_cache": False, "skip_instance_cache": True}  # others write the bucket too
# What a library waits and tries by itself before `_try` hears of it: s3fs and botocore would try five times each.
_ONE_TRY: dict[str, dict[str, Any]] = {"s3": {"config_kwargs": {"retries": {"max_attempts": 0}}}}
# Errors of the stores' own libraries that another try does not mend, by name: few have all of them installed.
_LASTING = frozenset({
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound", "NoRegionError",
    "DefaultCredentialsError", "RefreshError", "ClientAuthenticationError", "ParamValidationError",
    "ResourceNotFoundError",  # of Azure: no such container
})  # fmt: skip
_CONDITION_FAILED = (412, "412")  # of gcsfs, which has no error of its own for it
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, a profile, or a role of the machine or service account",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS, or a service account of the machine or pod",
    "az": "AZURE_STORAGE_ACCOUNT_NAME with AZURE_STORAGE_ACCOUNT_KEY, or a workload identity",
}
_LONGEST_REASON = 300  # characters
_REQUEST_SECONDS = 30.0  # of one that moves little
_SLOWEST = 2**20  # bytes/s, of uploads


class StoreError(UserError):
    """A bucket cannot be used; the message names the address and what to do."""


class Exists(Exception):
    """The object that was to be created is there already."""


class Bucket:
    """What lies below an address. Names are relative to it. All methods may be called from several threads."""

    def __init__(
        self,
        address: Address,
        give_up_after: float,
        filesystem: Any = None,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """`give_up_after` in s, of one request with all its tries; `filesystem` is fsspec's."""
        self.address, self._give_up_after, self._sleep = address, give_up_after, sleep
        self._fs = _filesystem(address) if filesystem is None else filesystem

    def below(self, name: str) -> Bucket:
        """What lies below a prefix."""
        return Bucket(self.address / name, self._give_up_after, self._fs, self._sleep)

    def within(self, seconds: float) -> Bucket:
        """The same, which gives up sooner."""
        return Bucket(self.address, min(seconds, self._give_up_after), self._fs, self._sleep)

    def put(self, name: str, file: Path) -> bool:
        """Upload a file; an object of this name is replaced. False where the file is gone."""

        def request() -> bool:
            try:
                self._call("put_file", str(file), self._key(name), seconds=_time_for(file.stat().st_size))
            except FileNotFoundError:
                if file.exists():
                    raise
                return False
            return True

        return self._try(request, "write", name)

    def write(self, name: str, content: bytes) -> None:
        """An object with this content, in place of one that is there."""
        self._try(lambda: self._call("pipe_file", self._key(name), content), "write", name)

    def create(self, name: str, content: bytes) -> None:
        """An object that is not there yet; `Exists` where it is, and its content is another one.

        A store that does not know the condition overwrites: what is there afterwards is compared.
        """
        with suppress(Exists):  # perhaps it is of this call, whose first answer was lost
            self._try(lambda: self._call("pipe_file", self._key(name), content, mode="create"), "write", name)
        if self.read(name) != content:
            raise Exists(name)

    def read(self, name: str) -> bytes | None:
        """An object's content; None where there is none."""
        return self._found(lambda: bytes(self._call("cat_file", self._key(name))), name)

    def get(self, name: str, file: Path) -> bool:
        """Download an object to a file; False where there is none."""
        partial = file.with_name(f"{file.name}.partial")
        try:
            found = self._found(
                lambda: self._call("get_file", self._key(name), str(partial), seconds=None) or True, name
            )
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        if not found:
            partial.unlink(missing_ok=True)
            return False
        partial.replace(file)
        return True

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes by name of all objects below a prefix, which ends before a slash."""
        start = self._key(prefix) if prefix else self.address.key
        self._fs.invalidate_cache()
        found = self._try(lambda: self._call("find", start, detail=True), "list", prefix)
        base = f"{self.address.key}/"
        named = {str(key).lstrip("/"): facts for key, facts in found.items()}
        return {k.removeprefix(base): int(f["size"]) for k, f in named.items() if k.startswith(f"{start}/")}

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects one after the other, in this order; one that is not there is no error."""
        for name in names:
            self._found(partial(self._call, "rm_file", self._key(name)), name, "delete")

    def check(self) -> None:
        """`StoreError` where the bucket cannot be listed."""
        self.sizes(".kat-ray")

    def _call(self, method: str, *arguments: Any, seconds: float | None = _REQUEST_SECONDS, **options: Any) -> Any:
        """One request, ended after `seconds`: libraries do not always notice a store that is silent.

        None leaves it to the library, whose time-out between bytes holds for downloads.
        """
        if getattr(self._fs, "async_impl", False) is not True:
            return getattr(self._fs, method)(*arguments, **options)
        from fsspec.asyn import sync

        return sync(self._fs.loop, getattr(self._fs, f"_{method}"), *arguments, timeout=seconds, **options)

    def _key(self, name: str) -> str:
        return f"{self.address.key}/{name}"

    def _found(self, request: Callable[[], T], name: str, verb: str = "read") -> T | None:
        """What a request gives; None where there is no such object, but the bucket is there."""
        try:
            return self._try(request, verb, name)
        except _Absent as absent:
            if "bucket does not exist" in str(absent) or "NoSuchBucket" in str(absent):
                raise StoreError(self._words(absent.error, verb, name)) from absent.error
            return None

    def _try(self, request: Callable[[], T], verb: str, name: str) -> T:
        retry = Retry(time.monotonic(), self._give_up_after)
        while True:
            try:
                return request()
            except FileExistsError as error:
                raise Exists(name) from error
            except FileNotFoundError as error:
                if verb in ("read", "delete"):
                    raise _Absent(error) from error
                raise StoreError(self._words(error, verb, name)) from error
            except Exception as error:  # each store's library raises its own, and none of them is imported here
                if getattr(error, "code", None) in _CONDITION_FAILED:
                    raise Exists(name) from error
                if _is_lasting(error):
                    raise StoreError(self._words(error, verb, name)) from error
                wait = retry.wait(time.monotonic(), random.random())  # noqa: S311
                if wait is None:
                    raise StoreError(self._gave_up(error, verb, name)) from error
                if retry.failures == 1:
                    log.warning("%s: %s; trying again for %g s", self.address, _reason(error), self._give_up_after)
                self._sleep(wait)

    def _words(self, error: Exception, verb: str, name: str) -> str:
        address, scheme = self.address, self.address.scheme
        what = f"run.dir = {address.url!r}: cannot {verb} {name or 'it'}: {_reason(error)}"
        if isinstance(error, FileNotFoundError):
            return f"{what}; make the bucket {address.bucket!r} first, or correct its name"
        return (
            f"{what}; the process needs to read, list, write and delete there, with credentials of the environment "
            f"({_CREDENTIALS.get(scheme, 'of the store')})"
        )

    def _gave_up(self, error: Exception, verb: str, name: str) -> str:
        return (
            f"run.dir = {self.address.url!r}: cannot {verb} {name or 'it'}: no good answer for "
            f"{self._give_up_after:g} s (run.store_timeout): {_reason(error)}. What is whole there stays: see to "
            "the store, its address and the network, and go on with --resume"
        )


class _Absent(Exception):
    def __init__(self, error: FileNotFoundError) -> None:
        super().__init__(str(error))
        self.error = error


def _time_for(size: int) -> float:
    return _REQUEST_SECONDS + size / _SLOWEST


def _is_lasting(error: Exception) -> bool:
    lasting = (PermissionError, IsADirectoryError, NotADirectoryError, ValueError, TypeError, ImportError)
    names = {kind.__name__ for kind in type(error).__mro__}
    invalid = isinstance(error, OSError) and error.errno == errno.EINVAL  # such as a name that no bucket has
    return isinstance(error, lasting) or invalid or bool(names & _LASTING)


def _reason(error: BaseException) -> str:
    text = next(iter(str(error).strip().splitlines()), "")
    return redact(f"{type(error).__name__}: {text}" if text else type(error).__name__)[:_LONGEST_REASON]


def _filesystem(address: Address) -> Any:
    try:
        import fsspec

        found = fsspec.filesystem(address.scheme, **_NO_LISTINGS, **_ONE_TRY.get(address.scheme, {}))
    except ImportError as error:
        extra, package = address.scheme, EXTRAS.get(address.scheme, "fsspec")
        raise StoreError(
            f"run.dir = {address.url!r}: the package {package} is not installed: pip install 'kat-ray[{extra}]', "
            "on every node of a cluster"
        ) from error
    except Exception as error:  # of a library's constructor, which looks for credentials: gcsfs, adlfs
        raise StoreError(
            f"run.dir = {address.url!r}: cannot be opened: {_reason(error)}; credentials come from the environment "
            f"({_CREDENTIALS.get(address.scheme, 'of the store')})"
        ) from error
    if address.scheme == "s3":
        found.retries = 1
    return found
