"""`Job`: what a run of `tokenflow tokenize` makes, kept beside its output, so that the same command goes on after any end.

Below the output, `__tokenflow__` holds `job.json` (bundle and options), `shards.jsonl` (the shards, one a line) and, for each
shard that is done, `done/NNNNN.json`. A shard's output file appears whole, and then its record: without one it is made again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields

from tokenflow_sdk import __version__
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.dataset.inputs import Shard
from tokenflow_sdk.dataset.job_lock import start_lock
from tokenflow_sdk.dataset.job_options import JobOptions
from tokenflow_sdk.dataset.outputs import DONE, FORMATS, STATE
from tokenflow_sdk.dataset.storage import Storage
from tokenflow_sdk.errors import ArgumentError, DatasetError, StorageError
from tokenflow_sdk.pipeline import map_ahead

__all__ = ["DoneRecord", "Job", "place", "require_usable"]

_logger = logging.getLogger("tokenflow_sdk")
_FORMAT = 1
_READERS = 16
"""Records of shards that are read at once: on remote storage each takes a while."""


@dataclass(frozen=True)
class DoneRecord:
    """What is known of a shard whose output file is there.

    Args:
        shard: its index.
        bytes, sha256: of the output file.
        rows: in it, those with an error included.
        errors: how many rows have an error of each class.
        seconds: that each stage took, by its name; stages overlap.
        device: where it was encoded.
    """

    shard: int
    bytes: int
    sha256: str
    rows: int
    errors: Mapping[str, int] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    device: str = ""

    @property
    def bad(self) -> int:
        """Rows with an error."""
        return sum(self.errors.values())

    @property
    def not_given(self) -> int:
        """Rows whose picture a storage did not give, which may do so later."""
        return self.errors.get(StorageError.__name__, 0)


class Job:
    """A job and how far it is. Made by `begin` or `load`.

    Attributes:
        output: where it writes.
        options: complete.
        bundle_sha256: of the tokenizer's bundle.
        inputs: as they were given.
        shards: all of them.
        done: records of those that are done, by their index.
    """

    def __init__(
        self, output: Storage, options: JobOptions, bundle_sha256: str, inputs: Sequence[str], shards: Sequence[Shard]
    ) -> None:
        self.output, self.options, self.bundle_sha256, self.inputs = output, options, bundle_sha256, tuple(inputs)
        self.shards = list(shards)
        self.done: dict[int, DoneRecord] = {}

    @classmethod
    def begin(
        cls,
        output: Storage,
        options: JobOptions,
        bundle: Bundle[TokenizerConfig],
        inputs: Sequence[str],
        shards: Iterable[Shard],
        mended: bool = False,
    ) -> Job:
        """Begin a job, or go on with the one in the output.

        Args:
            output: where it writes.
            options: of the output.
            bundle: of the tokenizer.
            inputs: as they were given.
            shards: read once, after the bundle and the options were compared.
            mended: pictures of shards that are done with errors may have changed. Those of shards that are not done always may.

        Raises:
            DatasetError: the output holds something else, or the bundle, an option or the inputs are not those that the job
                began with.
            OutputError, StorageError: the output cannot be read or written.
        """
        require_usable(output)
        stored = _load(output)
        job = cls(output, options.complete(bundle.config), bundle.sha256, inputs, ())
        if stored is not None:
            job._require_same(stored)  # before the listing, which may take minutes
        job.shards = list(shards)
        if stored is None:
            if job._store_first():
                return job
            stored = cls.load(output)  # of another process, which began meanwhile
            job._require_same(stored)
        job.done = stored.done
        changed = _changed(stored.shards, job.shards)
        # Nothing was made of a shard that is not done: a tar that ended half-way may be another one now.
        mendable = len(stored.shards) == len(job.shards) and all(i not in job.done or job.done[i].bad for i in changed)
        if not mendable or (not mended and any(i in job.done for i in changed)):
            raise DatasetError(
                f"The inputs are not those that the job in {output.address} began with: {_difference(stored, job, changed)}.",
                "Put them back as they were, or choose another -o."
                + (" Where bad pictures were mended, give --retry-errors." if mendable else ""),
            )
        if changed:
            job._store()
        return job

    @classmethod
    def load(cls, output: Storage) -> Job:
        """The job in an output.

        Raises:
            DatasetError: there is none, or its state is damaged.
        """
        if (job := _load(output)) is None:
            raise DatasetError(f"{output.address} holds no output of `tokenflow tokenize`.", "Give the -o of a job.")
        return job

    def file(self, index: int) -> str:
        """Name of a shard's output file."""
        return f"{index:05d}{FORMATS[self.options.format]}"

    def finish(self, record: DoneRecord) -> None:
        """Remember that a shard's output file is there. Raises OutputError, StorageError."""
        self.output.write(_record_name(record.shard), json.dumps(asdict(record), sort_keys=True).encode())
        self.done[record.shard] = record

    def forget(self, index: int) -> None:
        """Let a shard count as not done, before its file is replaced. Raises OutputError, StorageError."""
        self.output.delete(_record_name(index))
        self.done.pop(index, None)

    def forget_changed(self, shards: Iterable[Shard]) -> None:
        """Let those of these shards count as not done whose output file has not the size that was written.

        Nobody else may be making them. `is_as_written` notices more, but reads the file.

        Raises:
            OutputError, StorageError: the output cannot be read, or a record not deleted.
        """
        sizes = {} if self.output.is_local else {entry.name: entry.size for entry in self.output.scan()}
        for index in [shard.index for shard in shards if shard.index in self.done]:
            name, written = self.file(index), self.done[index].bytes
            found = self.output.find(name) if sizes.get(name) is None else None  # a local listing has no sizes
            size = found.size if found else sizes.get(name, 0)
            if size not in (written, None):
                _logger.warning(
                    "%s has %s of the %s bytes that were written: shard %05d is made again.",
                    self.output.path(name), size, written, index,
                )  # fmt: skip
                self.forget(index)

    def is_as_written(self, record: DoneRecord) -> bool:
        """Whether the output file of a shard has the bytes that were written. Raises DatasetFileError, StorageError."""
        digest, size = hashlib.sha256(), 0
        with self.output.open(self.file(record.shard)) as file:
            while part := file.read(2**22):
                digest.update(part)
                size += len(part)
        return (size, digest.hexdigest()) == (record.bytes, record.sha256)

    def delete_leftovers(self, shards: Iterable[Shard]) -> None:
        """Delete what killed processes left half written of these shards, which nobody else may be making."""
        indices = [shard.index for shard in shards]
        self.output.delete_leftovers(names={self.file(index) for index in indices})
        self.output.delete_leftovers(DONE, {_record_name(index).removeprefix(f"{DONE}/") for index in indices})

    def _store_first(self) -> bool:
        """Store the job, unless another process has begun one meanwhile."""
        with start_lock(self.output, STATE) if self.output.is_local else nullcontext():
            if is_new := self.output.find(f"{STATE}/job.json") is None:
                self._store()
        return is_new

    def _store(self) -> None:
        # job.json last: where it is, the list of shards is whole.
        lines = "".join(f"{json.dumps(shard.to_json(), separators=(',', ':'))}\n" for shard in self.shards)
        self.output.write(f"{STATE}/shards.jsonl", lines.encode())
        content = {
            "format": _FORMAT,
            "sdk": __version__,
            "bundle_sha256": self.bundle_sha256,
            "options": asdict(self.options),
            "inputs": self.inputs,
            "shards": len(self.shards),
        }
        self.output.write(f"{STATE}/job.json", json.dumps(content, indent=2).encode())

    def _require_same(self, stored: Job) -> None:
        address = self.output.address
        if stored.bundle_sha256 != self.bundle_sha256:
            raise DatasetError(
                f"The job in {address} began with another bundle: its bundle.json has the SHA-256 "
                f"{stored.bundle_sha256[:16]}..., this one {self.bundle_sha256[:16]}....",
                "Give the same --bundle as before, or choose another -o.",
            )
        for option in fields(JobOptions):
            before, now = getattr(stored.options, option.name), getattr(self.options, option.name)
            if before != now:
                name = f"--{option.name.replace('_', '-')}"
                raise DatasetError(
                    f"The job in {address} began with another {name}: it was {_shown(before)}, and now it is {_shown(now)}.",
                    f"Give the same {name} as before, or choose another -o.",
                )


def require_usable(output: Storage) -> None:
    """Raise DatasetError if something lies where a job is to write, which no job has written."""
    used = next((name for name in _names(output) if not name.startswith((".", "_"))), None)
    # Looked for after the names: another task may begin the job meanwhile.
    if used is not None and output.find(f"{STATE}/job.json") is None:
        raise DatasetError(f"{output.address} holds {used} and is not the output of a job.", "Choose another -o, or empty it.")


def place(shard: Shard) -> str:
    """Where a shard is, for messages."""
    return f"{shard.where} from {shard.first} on" if shard.first else shard.where


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return ",".join(value) or "nothing"
    if value is None or isinstance(value, bool):
        return "given" if value else "not given"
    return str(value)


def _changed(before: Sequence[Shard], now: Sequence[Shard]) -> list[int]:
    """Indices of the shards of both lists whose content is not the same. Where it lies may change."""
    return [
        old.index
        for old, new in zip(before, now, strict=False)
        if (old.kind, old.fingerprint, old.count) != (new.kind, new.fingerprint, new.count)
    ]


def _difference(before: Job, now: Job, changed: Sequence[int]) -> str:
    if not changed:
        return f"there were {len(before.shards):,} shards and there are {len(now.shards):,}"
    shard = now.shards[changed[0]]
    more = f", and {len(changed) - 1:,} more shards differ" if len(changed) > 1 else ""
    return f"shard {shard.index:05d} ({place(shard)}) has other files or other sizes{more}"


def _record_name(index: int) -> str:
    return f"{DONE}/{index:05d}.json"


def _load(output: Storage) -> Job | None:
    """The job in an output; None if there is none."""
    name = f"{STATE}/job.json"
    if output.find(name) is None:
        return None
    try:
        content = json.loads(output.read(name))
        if content["format"] > _FORMAT:
            raise DatasetError(
                f"{output.path(name)} was written by tokenflow-sdk {content['sdk']}, which is newer than this one.",
                "Install that version.",
            )
        options = content["options"]
        options = JobOptions(**options | {"also": tuple(options["also"])})
        lines = output.read(f"{STATE}/shards.jsonl").splitlines()
        shards = [Shard.from_json(json.loads(line)) for line in lines]
        if len(shards) != content["shards"]:
            raise ValueError(f"{len(shards)} of {content['shards']} shards")
        job = Job(output, options, str(content["bundle_sha256"]), content["inputs"], shards)
    except (ValueError, LookupError, TypeError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise DatasetError(
            f"The state of the job in {output.address} is damaged: {error}.",
            f"Empty {output.address} and begin again, or choose another -o.",
        ) from error
    job.done = _records(job)
    return job


def _records(job: Job) -> dict[int, DoneRecord]:
    """Records of the shards whose record and file are there and whole."""
    files = set(_names(job.output))
    names = [name for name in _names(job.output, DONE) if name.endswith(".json")]
    threads = 1 if job.output.is_local else _READERS
    found = map_ahead(lambda name: _record(job.output.read(f"{DONE}/{name}")), names, threads, may_hang=True)
    shards = range(len(job.shards))
    return {record.shard: record for record in found if record and record.shard in shards and job.file(record.shard) in files}


def _names(output: Storage, directory: str = "") -> list[str]:
    """Names in a directory, sorted; none if it is not there."""
    return [] if output.find(directory) is None else sorted(entry.name for entry in output.scan(directory))


def _record(content: bytes) -> DoneRecord | None:
    try:
        return DoneRecord(**json.loads(content))
    except (ValueError, TypeError):  # cut by a power failure, or touched by others
        return None
