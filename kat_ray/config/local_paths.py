"""Paths are of file systems that all nodes mount; object stores are not read or written."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

# Without the check `Path` makes a local folder `s3:` of such a path, or a hub is asked for it.
ADVICE = (
    "is the address of an object store or server, and only paths are read and written: mount it as a file system "
    "on all nodes (a CSI driver, Mountpoint, gcsfuse, JuiceFS) and give the path there"
)

URL = "url"  # the kind of error by which `load_config` knows it


def is_url(text: str) -> bool:
    """Whether a text names something by a scheme, such as `s3://bucket/run`."""
    return "://" in text


def _local(text: str) -> str:
    if is_url(text):
        raise PydanticCustomError(URL, ADVICE)
    return text


LocalPath = Annotated[str, AfterValidator(_local)]
