"""A bucket in memory, which fails or dies at a request of one's choice. No store, no network."""

from contextlib import contextmanager
from unittest import mock

from fsspec.implementations.memory import MemoryFileSystem

from kat_ray.storage import bucket as bucket_module

CHANGES = ("put_file", "pipe_file", "rm_file")


class Killed(BaseException):
    """The process is gone at this request: no handler of errors sees it."""


class MemoryStore:
    """fsspec's verbs over a dictionary of its own, with everything that was changed, in order."""

    def __init__(self):
        self._fs = MemoryFileSystem(skip_instance_cache=True)
        self._fs.store, self._fs.pseudo_dirs = {}, [""]
        self.changes = []
        self.die_at = None  # before the change of this number; a half: after it
        self.failures = []  # exceptions of the next requests

    def __getattr__(self, verb):
        method = getattr(self._fs, verb)
        if verb == "invalidate_cache":
            return method

        def request(*args, **kwargs):
            if self.failures:
                raise self.failures.pop(0)
            if verb not in CHANGES:
                return method(*args, **kwargs)
            if self.die_at is not None and len(self.changes) == self.die_at:
                raise Killed
            answer = method(*args, **kwargs)
            self.changes.append((verb, args[1] if verb == "put_file" else args[0]))
            if self.die_at is not None and len(self.changes) == self.die_at + 0.5:
                raise Killed
            return answer

        return request

    def content(self, below=""):
        """Bytes by key."""
        found = {key.lstrip("/"): bytes(file.getbuffer()) for key, file in self._fs.store.items()}
        return {key: content for key, content in found.items() if key.startswith(below)}


@contextmanager
def memory_store():
    """Every `Bucket` that is made inside is in this store."""
    store = MemoryStore()
    with mock.patch.object(bucket_module, "_filesystem", lambda address: store):
        yield store
