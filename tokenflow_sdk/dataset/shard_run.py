"""Makes one shard: reads its pictures, encodes them beside each other, writes one file, and records that it is done."""

from __future__ import annotations

import hashlib
import io
import random
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from time import perf_counter
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import JpegImagePlugin

from tokenflow_sdk.dataset.inputs import Row, Shard, read_shard
from tokenflow_sdk.dataset.job import DoneRecord, Job
from tokenflow_sdk.dataset.job_options import JobOptions
from tokenflow_sdk.dataset.outputs import Record, open_writer
from tokenflow_sdk.dataset.read_ahead import read_ahead
from tokenflow_sdk.dataset.reading import read_records
from tokenflow_sdk.dataset.rows import Picture
from tokenflow_sdk.errors import DatasetError, OutputError, StorageError, TokenFlowError
from tokenflow_sdk.files import file_sha256
from tokenflow_sdk.pictures.images import fit, load_image
from tokenflow_sdk.pipeline import encode_ahead, map_ahead
from tokenflow_sdk.tokenizer import Tokenizer

__all__ = ["DELAYS", "STAGES", "Encoder", "ShardStopped", "Stages", "Watch", "run_shard"]

T = TypeVar("T")

STAGES = ("read", "prepare", "encode", "write")
"""What is timed of a shard. They overlap."""
DELAYS = (1.0, 4.0, 16.0)
"""Seconds before each further try where a storage failed."""
_AHEAD = 2**25
"""Bytes of pictures that are read before threads prepare them."""
_READERS = 16
"""Single files on remote storage that are read at once."""
_PATIENCE = 3
"""Single files in a row that are given up before others get one try only."""
_DOWN = 16
"""Single files in a row that a storage does not give when it is down."""


class ShardStopped(BaseException):
    """The run is to end, and the shard is left as if it had not begun."""


class Stages:
    """Seconds that each stage took, added up by all threads.

    Args:
        total: where they are added as well.
    """

    def __init__(self, total: Stages | None = None) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._total, self._lock = total, threading.Lock()

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        began = perf_counter()
        try:
            yield
        finally:
            self.add({stage: perf_counter() - began})

    def add(self, seconds: Mapping[str, float]) -> None:
        """Add seconds by stage."""
        with self._lock:
            for stage, value in seconds.items():
                self.seconds[stage] += value
        if self._total is not None:
            self._total.add(seconds)


class Watch:
    """Sees how a shard gets on. Its methods are called by the thread that makes the shard.

    Args:
        stop: set by another thread to end the shard early.
        stages: where times are added.
    """

    def __init__(self, stop: threading.Event | None = None, stages: Stages | None = None) -> None:
        self.stop, self.stages = stop or threading.Event(), stages

    def begun(self) -> None:
        """A try of the shard begins: rows of the one before do not count."""

    def wrote(self, record: Record) -> None:
        """A row was written."""

    def idle(self) -> None:
        """Nothing is read for now: all was, and the last pictures are encoded; or the shard waits for its next try."""


class _Ready(NamedTuple):
    """A picture before it is encoded: u8 [H, W, 3] of the tokenizer's size, and its row without codes."""

    pixels: NDArray[np.uint8]
    record: Record


class _Encoded(NamedTuple):
    """A picture's row without codes, what the engine made of it, int32 [l], and its extra columns."""

    record: Record
    indices: NDArray[np.int32]
    extra: dict[str, NDArray[np.float16]]


_Item: TypeAlias = "tuple[Row, Record | None]"
"""A row, and what an earlier run made of it."""


class Encoder:
    """A tokenizer that makes records of rows; shards that run at once share its lanes.

    Args:
        tokenizer: of the job's bundle.
        options: of the job, complete.
        workers: threads that prepare pictures, of each shard; 0: the lanes do, a picture at a time. Where the engine's calls
            fill the cores, more threads would only take turns with them, and each other's caches.
        lanes: calls of the engine at once, of all shards.
    """

    def __init__(self, tokenizer: Tokenizer, options: JobOptions, workers: int, lanes: int) -> None:
        self.tokenizer, self.options, self.workers, self.lanes = tokenizer, options, workers, lanes
        self.stamp = options.stamp(tokenizer.bundle)
        self._free = threading.BoundedSemaphore(lanes)

    @classmethod
    def fitting(cls, tokenizer: Tokenizer, options: JobOptions, workers: int, lanes: int) -> Encoder:
        """One with workers only where they do not take turns with the lanes on the same cores. Loads the graph."""
        on_cpu = tokenizer.graphs.load("encode").device == "cpu"
        return cls(tokenizer, options, 0 if on_cpu and tokenizer.batch_limit == 1 else workers, lanes)

    def records(self, items: Iterable[_Item], stages: Stages) -> Generator[Record, None, None]:
        """The record of each row, in order. Rows that an earlier run made well are not encoded again."""

        def prepare(item: _Item) -> _Ready | Record:
            with stages.timed("prepare"):
                return self._prepared(*item)

        def encode(batch: Sequence[_Ready | Record]) -> list[_Encoded | Record]:
            ready = [each for each in batch if isinstance(each, _Ready)]
            with stages.timed("encode"):
                found = iter(self._encoded(ready) if ready else ())
            return [next(found) if isinstance(each, _Ready) else each for each in batch]

        def in_lane(batch: Sequence[_Ready | Record]) -> list[_Encoded | Record]:
            with self._free:
                return encode(batch)

        def whole(item: _Item) -> _Encoded | Record:
            with self._free:
                return encode([prepare(item)])[0]

        if self.workers:
            results = encode_ahead(prepare, in_lane, items, self.tokenizer.batch_limit, self.workers, self.lanes)
        else:
            # Twice as many wait as run, so that a picture that takes long holds up no others.
            results = map_ahead(whole, items, 2 * self.lanes)
        with closing(results):
            for each in results:
                # Not in a lane, which the next pictures wait for.
                with stages.timed("write"):
                    record = each if isinstance(each, Record) else self._finished(*each)
                yield record

    def _prepared(self, row: Row, before: Record | None) -> _Ready | Record:
        if isinstance(row.data, TokenFlowError):
            return Record(row.key, None, error=_text(row.data))
        record = Record(row.key, None, sha256=hashlib.sha256(row.data).hexdigest())
        if before is not None and before.error is None and before.sha256 == record.sha256:
            return before
        try:
            pixels, (width, height) = self._pixels(row.data)
        except TokenFlowError as error:
            return replace(record, error=_text(error))
        return _Ready(pixels, replace(record, width=width, height=height))

    def _pixels(self, data: bytes) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        """What the engine reads of a picture, u8 [H, W, 3], and the upright picture's width and height."""
        o, size = self.options, self.tokenizer.config.image_size
        image = load_image(data, color=o.color, max_pixels=o.max_pixels, draft_size=size if o.fast else None)
        assert o.preprocess is not None
        whole = _drafted_from(data, image.size) if o.fast else image.size
        return fit(image, size, o.preprocess), whole

    def _encoded(self, pictures: Sequence[_Ready]) -> list[_Encoded]:
        tok = self.tokenizer
        rows = tok.encode_array(np.stack([each.pixels for each in pictures]))[:, : self.stamp.length]
        columns = {name: getattr(tok, name)(rows).astype(np.float16) for name in self.stamp.shapes}
        return [
            _Encoded(each.record, rows[i], {name: column[i] for name, column in columns.items()})
            for i, each in enumerate(pictures)
        ]

    def _finished(self, record: Record, indices: NDArray[np.int32], extra: dict[str, NDArray[np.float16]]) -> Record:
        preparation = replace(self.stamp.preparation, source=str(record.sha256)[:16])
        return replace(record, codes=self.tokenizer.codes(indices, preparation), extra=extra)


def run_shard(encoder: Encoder, job: Job, shard: Shard, watch: Watch | None = None) -> DoneRecord:
    """Make a shard's output file and its record.

    A storage that fails gets three more tries: of a single file or the whole shard where it is read, else only to send what
    is made.
    If the shard is done, its rows without an error stay as they are where their pictures are the same.

    Args:
        encoder: of the job's options.
        job: whose shard it is.
        shard: to make.
        watch: told how it gets on.

    Raises:
        DatasetError, OutputError: the shard cannot be made.
        ShardStopped: `watch.stop` was set.
    """
    watch = Watch() if watch is None else watch
    return _again(lambda: _attempt(encoder, job, shard, watch), StorageError, watch)


def _again(call: Callable[[], T], kind: type[Exception], watch: Watch) -> T:
    """What a call gives, which gets more tries where it raises an exception of a kind, unless it was not permitted."""
    for delay in DELAYS:
        try:
            return call()
        except kind as error:
            if isinstance(error.__cause__, PermissionError):
                raise
            watch.idle()
            # Others that failed with it are not to try at the same moment.
            if watch.stop.wait(delay * random.uniform(1, 1.5)):  # noqa: S311
                raise ShardStopped from None
    return call()


def _unless_stopped(call: Callable[[], T], stop: threading.Event) -> T:
    """What a call gives that may never return, as those of a network. Nothing waits for it when the run is to end."""
    for made in read_ahead((call() for _ in range(1)), lambda _: 0, 1, stop):
        return made
    raise ShardStopped


def _attempt(encoder: Encoder, job: Job, shard: Shard, watch: Watch) -> DoneRecord:
    watch.begun()
    stages, errors, count = Stages(watch.stages), Counter[str](), 0

    def sending(call: Callable[[], None]) -> None:
        if job.output.is_local:  # the disk is full, say, and stays so
            call()
        else:
            _again(lambda: _unless_stopped(call, watch.stop), OutputError, watch)

    items = read_ahead(_rows(job, shard, stages, watch.stop), _size, _AHEAD, watch.stop)
    with job.output.new_file(job.file(shard.index), sending) as path:
        with open_writer(path, encoder.stamp, job.options.format) as writer:
            with closing(_then(items, watch.idle)) as read, closing(encoder.records(read, stages)) as records:
                for record in records:
                    if watch.stop.is_set():
                        break
                    with stages.timed("write"):
                        writer.add(record)
                    count += 1
                    if record.error is not None:
                        errors[record.error.partition(":")[0]] += 1
                    watch.wrote(record)
            if watch.stop.is_set():
                raise ShardStopped
            written = perf_counter()
        stages.add({"write": perf_counter() - written})
        with stages.timed("write"):
            size, digest = path.stat().st_size, file_sha256(path)
            # A record never stands beside another file than its own.
            sending(lambda: job.forget(shard.index))
    seconds = {stage: round(value, 6) for stage, value in stages.seconds.items()}
    done = DoneRecord(shard.index, size, digest, count, dict(sorted(errors.items())), seconds, encoder.tokenizer.device)
    sending(lambda: job.finish(done))
    return done


def _rows(job: Job, shard: Shard, stages: Stages, stop: threading.Event) -> Generator[_Item, None, None]:
    """The shard's rows, each with what an earlier run made of the same key.

    A single file that the storage does not give is a row with its error, unless too many are not given.
    """
    done = job.done.get(shard.index)
    # Rows of a file that somebody changed are not to be taken over into one whose record says that it is well.
    keeps = done is not None and job.is_as_written(done)
    old = read_records(job.output, job.file(shard.index)) if keeps else iter(())
    rows = read_shard(shard, job.options.reading, _READERS if "://" in shard.where else 1, _patient(stop))
    count = failed = 0
    while True:
        with stages.timed("read"):
            row, before = next(rows, None), next(old, None)
        if row is not None:
            count += 1
            failed = failed + 1 if isinstance(row.data, StorageError) else 0
            error = row.data
        if failed == _DOWN or (row is None and failed == count > 0):
            assert isinstance(error, StorageError)
            raise DatasetError(f"{failed} pictures in a row could not be read. The last: {error.message}", error.hint)
        if row is None:
            return
        yield row, before if before is not None and before.key == row.key else None


def _patient(stop: threading.Event) -> Callable[[Callable[[], Picture]], Picture]:
    """Reads a single file, with more tries; gives the StorageError of the last. May be called by several threads."""
    given_up = 0

    def read_again(read: Callable[[], Picture]) -> Picture:
        nonlocal given_up
        try:
            # The storage seems to be down: one try each, until it gives one again.
            found = read() if given_up >= _PATIENCE else _again(read, StorageError, Watch(stop))
        except StorageError as error:
            given_up += 1
            return error
        given_up = 0
        return found

    return read_again


def _then(items: Iterator[_Item], finished: Callable[[], None]) -> Generator[_Item, None, None]:
    yield from items
    finished()


def _size(item: _Item) -> int:
    data, before = item[0].data, item[1]
    # Of small pictures not too many either.
    size = 2**16 + (len(data) if isinstance(data, bytes) else 0)
    return size + (sum(column.nbytes for column in before.extra.values()) if before is not None else 0)


def _text(error: TokenFlowError) -> str:
    return f"{type(error).__name__}: {error.message}"


def _drafted_from(data: bytes, drafted: tuple[int, int]) -> tuple[int, int]:
    """Width and height of an upright picture that was perhaps decoded at a reduced size, as only JPEGs are."""
    if not data.startswith(b"\xff\xd8"):
        return drafted
    width, height = JpegImagePlugin.JpegImageFile(io.BytesIO(data)).size
    turned = (width > height) != (drafted[0] > drafted[1]) and drafted[0] != drafted[1]
    return (height, width) if turned else (width, height)
