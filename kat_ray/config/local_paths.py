"""Paths are of file systems that all nodes mount. A run may also be kept in a bucket (`run.dir`), by its
address.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

# Without the check `Path` makes a local folder `s3:` of such a path, or a hub is asked for it.
ADVICE = (
    "is the address of an object store or server, and only paths are read and written: mount it as a file system "
    "on all nodes (a CSI driver, Mountpoint, gcsfuse, JuiceFS) and give the path there"
)
SCHEMES = ("s3", "gs", "az")
RUN_ADVICE = (
    f"must be a folder, or an address of {', '.join(f'{s}://BUCKET/FOLDER' for s in SCHEMES)}, such as "
    "s3://my-bucket/runs"
)

URL, RUN_URL = "url", "run_url"  # kinds of errors by which `load_config` knows them
_RUN_URL = re.compile(r"[a-z0-9]+://[A-Za-z0-9][A-Za-z0-9._-]*(/[^/?#\s]+)*/?")


def is_url(text: str) -> bool:
    """Whether a text names something by a scheme, such as `s3://bucket/run`."""
    return "://" in text


def is_bucket_url(text: str) -> bool:
    """Whether a text is the address of something in a bucket."""
    return text.partition("://")[0] in SCHEMES and bool(_RUN_URL.fullmatch(text))


def _local(text: str) -> str:
    if is_url(text):
        raise PydanticCustomError(URL, ADVICE)
    return text


def _local_or_bucket(text: str) -> str:
    if is_url(text) and not is_bucket_url(text):
        raise PydanticCustomError(RUN_URL, RUN_ADVICE)
    return text


LocalPath = Annotated[str, AfterValidator(_local)]
RunPath = Annotated[str, AfterValidator(_local_or_bucket)]  # a folder, or a prefix of a bucket
