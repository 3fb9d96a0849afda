"""Fetches bundles from the Hugging Face hub, and tells its ids from paths."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from tokenflow_sdk.arguments import file_path, flag, shown
from tokenflow_sdk.bundle.missing import WEIGHT_ENDINGS, nearest
from tokenflow_sdk.bundle.schema import MANIFEST
from tokenflow_sdk.errors import ArgumentError, BundleNotFoundError, MissingPackageError

__all__ = ["HubOptions", "fetch", "is_hub_id"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DIRECTORIES = ("bundles", "checkpoints", "models")
"""Usual names of local directories. A path in one of them, given in the wrong directory, is not asked of a stranger."""
_FILES = (".json", ".onnx", ".tfc", *WEIGHT_ENDINGS)
_PATTERNS = ["*.onnx", "*.data", "*.npz", "*.npy", "*.json"]
"""The files of a bundle. Others in a repository are not fetched."""


@dataclass(frozen=True)
class HubOptions:
    """What of the hub is fetched, and how; for names that are paths only `revision` must be left out.

    Args:
        revision: branch, tag or commit; None: the newest. Only a commit always gives the same files.
        token: of a user who may read the repository; None: `HF_TOKEN` or that of `hf auth login`; False: none.
        cache_dir: directory that fetched files are kept in; None: the hub's own, `HF_HOME`.
        local_files_only: use what was fetched before, without any request.

    Raises:
        ArgumentError: an argument of another type, or an empty one.
    """

    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | os.PathLike[str] | None = None
    local_files_only: bool = False

    def __post_init__(self) -> None:
        given: object = self.revision
        if given is not None and (not isinstance(given, str) or not given):
            raise ArgumentError(f"revision={shown(given)} is none.", "Give a branch, a tag or a commit.")
        given = self.token
        if given is not None and (not isinstance(given, (str, bool)) or given == ""):
            # Not shown: it may be a secret in a wrong type.
            raise ArgumentError("token= is no token of the hub.", "Give a string, or leave it out to use HF_TOKEN.")
        if self.cache_dir is not None:
            file_path("cache_dir", self.cache_dir)
        object.__setattr__(self, "local_files_only", flag("local_files_only", self.local_files_only))

    def portable(self) -> HubOptions:
        """The options for other processes: without the token, which must not be stored in a pickle."""
        return replace(self, token=None)


def is_hub_id(name: str | os.PathLike[str]) -> bool:
    """Whether a name is an id of the hub: it looks like one, not like a path, and no directory is there that it could be in."""
    if not isinstance(name, str) or _HUB_ID.fullmatch(name) is None:
        return False
    parent = Path(name).parent
    return str(parent) not in _DIRECTORIES and not name.endswith(_FILES) and not os.path.lexists(parent)


def fetch(repo_id: str, options: HubOptions) -> Path:
    """The directory of a repository's files, which are downloaded if they are not in the cache.

    Raises:
        BundleNotFoundError: it is not on the hub, cannot be downloaded, or has no bundle.
        MissingPackageError: huggingface_hub is not installed.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingPackageError(
            f"{repo_id!r} is no directory here, and fetching it from the hub needs huggingface_hub.",
            f"Run `pip install 'tokenflow-sdk[hub]'`, or give the path of a bundle.{_meant(repo_id)}",
        ) from None
    try:
        fetched = snapshot_download(
            repo_id,
            revision=options.revision,
            token=options.token,
            cache_dir=None if options.cache_dir is None else Path(options.cache_dir).expanduser(),
            local_files_only=options.local_files_only,
            allow_patterns=_PATTERNS,
        )
        found = Path(fetched)
    except Exception as error:  # of the hub, its HTTP client, the file system, and ValueError for an invalid name
        why = (str(error) or type(error).__name__).splitlines()[0].removeprefix("Got: ").rstrip(".")
        again = "Fetch it once with local_files_only=False" if options.local_files_only else "Check the name and the network"
        raise BundleNotFoundError(
            f"{repo_id!r} is no directory here, and the hub did not deliver it: {why}.",
            f"{again}, or give the path of a bundle.{_meant(repo_id)}",
        ) from error
    if next(found.rglob(MANIFEST), None) is None:
        raise BundleNotFoundError(
            f"{repo_id!r} on the hub has no bundle (no {MANIFEST}).",
            f"A checkpoint in it becomes one by `tokenflow export tokenizer --checkpoint hf://{repo_id}/FILE --out DIR`.",
        )
    return found


def _meant(repo_id: str) -> str:
    close = nearest(Path(repo_id))
    return f" Did you mean {close}?" if close else ""
