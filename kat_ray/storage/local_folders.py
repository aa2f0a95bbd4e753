"""Folders of a node for what goes to a bucket and comes from it. Nothing in them is needed by another node."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from kat_ray.errors import UserError
from kat_ray.storage.address import Address


def local_root(local_dir: str | None) -> Path:
    """`run.local_dir`, or a folder of this user's below the system's temporary one; it exists afterwards.

    `UserError` where it cannot be made, or another user made it.
    """
    root = Path(local_dir).expanduser() if local_dir else Path(tempfile.gettempdir()) / f"kat-ray-{os.getuid()}"
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        owner = root.stat().st_uid
    except OSError as error:
        raise UserError(
            f"run.local_dir = {str(root)!r}: cannot be made: {error.strerror or error}; name a folder that can be "
            "written on every node"
        ) from error
    if not local_dir and owner != os.getuid():
        raise UserError(f"{root}: belongs to another user; name a folder of yours: run.local_dir")
    return root


def folder_of(address: Address, local_dir: str | None, purpose: str) -> Path:
    """Where what belongs to an address lies on this node, for `run`, `parts`, `fetched` or `read`."""
    digest = hashlib.sha256(address.url.encode()).hexdigest()[:12]
    return local_root(local_dir) / purpose / f"{address.scheme}-{digest}" / address.name
