"""Addresses of runs and their parts in a bucket: `s3://bucket/runs/name`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Address:
    """A prefix of keys in a bucket, or a key, without a slash at its end. Used like a path: `/`, `name`, `str`."""

    url: str

    @classmethod
    def of(cls, text: str) -> Address:
        """The address that a user gave."""
        return cls(text.rstrip("/"))

    @property
    def scheme(self) -> str:
        """What stands before `://`."""
        return self.url.partition("://")[0]

    @property
    def key(self) -> str:
        """Bucket and key, as fsspec takes them."""
        return self.url.partition("://")[2]

    @property
    def bucket(self) -> str:
        """The bucket's name (of `az`: the container's)."""
        return self.key.partition("/")[0]

    @property
    def name(self) -> str:
        """The last part."""
        return self.url.rpartition("/")[2]

    @property
    def parent(self) -> Address:
        """All but the last part."""
        return Address(self.url.rpartition("/")[0])

    def __truediv__(self, name: str) -> Address:
        return Address(f"{self.url}/{name}")

    def __str__(self) -> str:
        return self.url


Place = Path | Address  # where a run, a checkpoint or a file is
