"""A folder put into a repository of the Hugging Face hub: all that knows of its interface."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from kat_ray.errors import UserError
from kat_ray.observability.redact import redact

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PREFIX = "hub:"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_MADE_BY_THE_HUB = frozenset((".gitattributes",))  # of a repository that is new


class HubRepository:
    """A model repository that something is to be uploaded to; made with `hub:owner/name`."""

    def __init__(self, target: str, private: bool, overwrite: bool) -> None:
        self.name = target.removeprefix(PREFIX)
        self._private, self._overwrite = private, overwrite
        if not _REPOSITORY.fullmatch(self.name):
            raise UserError(f"--to {target}: must be hub:owner/name, such as hub:me/my-model")

    def check(self) -> None:
        """`UserError` where nothing can be uploaded, or where there is something that may not be replaced."""
        from huggingface_hub import HfApi, constants, get_token

        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"--to {PREFIX}{self.name}: HF_HUB_OFFLINE is set, and nothing is uploaded; unset it, or export to "
                "a folder and upload that later: hf upload OWNER/NAME DIR"
            )
        if get_token() is None:
            raise UserError(
                f"--to {PREFIX}{self.name}: there is no token of the hub; set HF_TOKEN to one that may write, or "
                "log in with: hf auth login"
            )
        try:
            there = self._files(HfApi())
        except self._errors() as error:
            raise self._refused(error) from error
        if there and not self._overwrite:
            shown = ", ".join(there[:3]) + (", ..." if len(there) > 3 else "")
            raise UserError(
                f"--to {PREFIX}{self.name}: the repository holds {shown}; name another one, or add --overwrite, "
                "which replaces all that is in it with one more commit (its history stays)"
            )

    def upload(self, folder: Path, message: str) -> str:
        """Make the repository where it is not there, and commit the folder; returns its address."""
        from huggingface_hub import HfApi

        api = HfApi()
        try:
            address = api.create_repo(self.name, private=self._private or None, exist_ok=True)
            api.upload_folder(
                repo_id=self.name, folder_path=folder, commit_message=message,
                delete_patterns="*" if self._overwrite else None,
            )  # fmt: skip
        except self._errors() as error:
            raise self._refused(error) from error
        return str(address)

    def _files(self, api: HfApi) -> list[str]:
        from huggingface_hub.errors import RepositoryNotFoundError

        try:
            return sorted({*api.list_repo_files(self.name)} - _MADE_BY_THE_HUB)
        except RepositoryNotFoundError:
            return []

    def _refused(self, error: Exception) -> UserError:
        lines = [line.strip() for line in redact(str(error), os.environ).splitlines() if line.strip()]
        return UserError(f"--to {PREFIX}{self.name}: the hub does not take it: {' '.join(lines[:2])[:400]}")

    @staticmethod
    def _errors() -> tuple[type[Exception], ...]:
        from huggingface_hub.errors import HFValidationError, HTTPError

        return (HTTPError, HFValidationError, OSError, ValueError)  # the last: answers that it cannot read
