"""`tokenflow tokenize`: data sets of pictures to data sets of codes, as a job that the same command goes on with."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from time import perf_counter
from typing import Any

from tokenflow_sdk.backends.cores import available_cores
from tokenflow_sdk.bundle.hub import HubOptions
from tokenflow_sdk.cli.console import stderr, stdout
from tokenflow_sdk.cli.opening import bundle_name, runtime_options
from tokenflow_sdk.cli.progress import make_bars
from tokenflow_sdk.dataset.inputs import find_shards
from tokenflow_sdk.dataset.job import Job, require_usable
from tokenflow_sdk.dataset.job_lock import Task, job_lock
from tokenflow_sdk.dataset.job_options import JobOptions
from tokenflow_sdk.dataset.outputs import STATE
from tokenflow_sdk.dataset.progress import Progress, Snapshot
from tokenflow_sdk.dataset.runner import run_local, shards_of, shards_to_do, store_summary, summarize
from tokenflow_sdk.dataset.shard_run import Encoder
from tokenflow_sdk.dataset.storage import Storage
from tokenflow_sdk.errors import ArgumentError, StorageError
from tokenflow_sdk.tokenizer import Tokenizer

__all__ = ["tokenize"]

_SHOWN = 20
"""Most failed shards that are printed; summary.json has all."""
_EVERY = 30.0
"""Seconds between lines about the progress."""
_LANES = 8
"""Most calls at once on a CPU, each on its share of the cores: memory grows with them."""

_logger = logging.getLogger("tokenflow_sdk")


def tokenize(arguments: argparse.Namespace) -> int:
    """Run a job, go on with one, or check one."""
    if arguments.verify is not None:
        return _verify(arguments)
    if not arguments.inputs:
        raise ArgumentError("No pictures were named.", "Give directories, tars or Parquet files; `tokenflow tokenize --help`.")
    if not arguments.output:
        raise ArgumentError("No output was named.", "Give a directory or an address with -o.")
    task = None if arguments.shard is None else Task.parse(arguments.shard)
    if task is not None and arguments.ray is not None:
        raise ArgumentError("--shard and --ray both divide a job.", "Give one of them.")
    options, output = _options(arguments), Storage(arguments.output)
    if arguments.ray is not None:
        from tokenflow_sdk.dataset.ray_runner import require_ray

        require_ray()
    require_usable(output)
    with ExitStack() as stack:
        tokenizers = [stack.enter_context(each) for each in _open(arguments)]
        options = options.complete(tokenizers[0].config)
        shards = find_shards(arguments.inputs, options.reading, output)
        # Before anything is written: inputs that are not there leave no output.
        first = list(itertools.islice(shards, 1))
        stack.enter_context(job_lock(output, STATE, task))
        with stderr.step(f"listing {', '.join(arguments.inputs)}", brief=True):
            every = itertools.chain(first, shards)
            job = Job.begin(output, options, tokenizers[0].bundle, arguments.inputs, every, arguments.retry_errors)
        job.delete_leftovers(shards_of(job, task))
        job.forget_changed(shards_of(job, task))
        return _run(arguments, job, task, tokenizers)


def _options(arguments: argparse.Namespace) -> JobOptions:
    names = ("format", "scales", "shard_size", "image_column", "key_column", "preprocess", "color", "fast", "max_pixels")
    also = tuple(name for name in (arguments.also or "").split(",") if name)
    return JobOptions(also=also, **{name: getattr(arguments, name) for name in names})


def _open(arguments: argparse.Namespace) -> list[Tokenizer]:
    """A tokenizer for each device. Their graphs are loaded when they are first used."""
    runtime = runtime_options(arguments)
    if runtime.threads is None:
        # As many calls at once as there are cores, up to a limit, are faster than few calls that share them.
        runtime = replace(runtime, threads=1 if arguments.ray is not None else -(-available_cores() // _LANES))
    name, hub = bundle_name(arguments), HubOptions(arguments.revision)
    with stderr.step(f"opening {name}", brief=True):
        return [
            Tokenizer.open(name, replace(runtime, device=device), arguments.batch_limit, hub, arguments.sha256)
            for device in _devices(arguments)
        ]


def _devices(arguments: argparse.Namespace) -> list[str]:
    if arguments.devices is None:
        return [arguments.device]
    if arguments.device != "auto" or arguments.ray is not None:
        other = "--device" if arguments.device != "auto" else "--ray"
        raise ArgumentError(f"--devices and {other} both say where the tokenizer runs.", "Give one of them.")
    if arguments.devices != "all":
        return str(arguments.devices).split(",")
    from tokenflow_sdk.backends.cuda import Cuda

    return [f"cuda:{number}" for number in range(Cuda().call("cudaGetDeviceCount"))]


def _run(arguments: argparse.Namespace, job: Job, task: Task | None, tokenizers: Sequence[Tokenizer]) -> int:
    shards = shards_to_do(job, task, arguments.retry_errors)
    address = job.output.address
    if not shards:
        summary = summarize(job, Progress((), {}), task)
        _say_end(arguments, summary)
        stderr.note(f"nothing to do: all {summary['shards']:,} shards are done", soft_wrap=True)
        return 0
    if done := len(job.done):
        stderr.note(f"{done:,} of {len(job.shards):,} shards in {address} are done", soft_wrap=True)
    try:
        with _first_warnings(), _shown(arguments) as show:
            if arguments.ray is None:
                workers = max(1, available_cores() // len(tokenizers))
                encoders = [Encoder.fitting(each, job.options, workers, each.lanes()) for each in tokenizers]
                progress = run_local(job, encoders, shards, show)
            else:
                from tokenflow_sdk.dataset.ray_runner import run_on_ray

                progress = run_on_ray(job, tokenizers[0], shards, arguments.ray, show, arguments.threads or 1)
    except KeyboardInterrupt:
        stderr.print(f"{len(job.done):,} of {len(job.shards):,} shards are done; the same command goes on", soft_wrap=True)
        raise
    summary = summarize(job, progress, task)
    store_summary(job, summary, task)
    _say_end(arguments, summary)
    return 1 if progress.failed or _not_given(summary) else 0


def _not_given(summary: dict[str, Any]) -> int:
    """How many pictures their storage did not give."""
    return int(summary["errors"].get(StorageError.__name__, 0))


@contextmanager
def _shown(arguments: argparse.Namespace) -> Iterator[Callable[[Snapshot], None]]:
    """Show how far a run is: a bar on a terminal, and lines elsewhere; with --json on stdout."""
    last = perf_counter()
    with make_bars() as bars:
        task = bars.add_task("tokenizing", total=None)

        def show(seen: Snapshot) -> None:
            nonlocal last
            busiest = f", {seen.bottleneck} is busiest" if seen.bottleneck else ""
            label = f"tokenizing, {seen.rate:,.1f} pictures/s, {seen.errors:,} errors{busiest}"
            bars.update(task, description=label, total=seen.expected, completed=seen.pictures)
            if perf_counter() - last >= _EVERY:
                last = perf_counter()
                _logger.info("%s", _line(seen))
                if arguments.json:
                    stdout.write(f"{json.dumps({'event': 'progress', **_figures(seen)})}\n")

        yield show


@contextmanager
def _first_warnings() -> Iterator[None]:
    """Show the first warning of each kind, and in the end how many more pictures have one: there may be millions."""
    seen, plain = Counter[str](), warnings.showwarning

    def show(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
        seen[category.__name__] += 1
        if seen[category.__name__] == 1:
            plain(message, category, *where, **options)

    with warnings.catch_warnings():
        # Otherwise Python would keep the text of each, to show none twice.
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        try:
            yield
        finally:
            for kind, count in sorted(seen.items()):
                if count > 1:
                    stderr.print(f"warning: {count - 1:,} more pictures with a {kind}", style="yellow", soft_wrap=True)


def _line(seen: Snapshot) -> str:
    total = "" if seen.expected is None else f" of {seen.expected:,}"
    left = "" if seen.left is None else f", {_duration(seen.left)} left"
    return (
        f"tokenizing: {seen.pictures:,}{total} pictures, {seen.errors:,} errors, {seen.done:,} of {seen.shards:,} shards, "
        f"{seen.failed:,} failed, {seen.rate:,.1f} pictures/s{left}; {seen.bottleneck or 'read'} is busiest"
    )


def _figures(seen: Snapshot) -> dict[str, Any]:
    names = ("pictures", "errors", "shards", "done", "failed", "seconds", "rate", "expected", "left", "bottleneck")
    found = {name: getattr(seen, name) for name in names}
    return {name: round(value, 3) if isinstance(value, float) else value for name, value in found.items()}


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _say_end(arguments: argparse.Namespace, summary: dict[str, Any]) -> None:
    if arguments.json:
        stdout.write(f"{json.dumps({'event': 'summary', **summary})}\n")
    run, failed, errors = summary["this_run"], summary["failed"], summary["errors"]
    for each in failed[:_SHOWN]:
        stderr.print(f"error: shard {each['shard']:05d} ({each['where']}): {each['error']}", style="red", soft_wrap=True)
    if failed:
        more = f" ({STATE}/summary.json has all)" if len(failed) > _SHOWN else ""
        words = f"{len(failed):,} of {summary['shards']:,} shards failed{more}; the same command tries them again"
        stderr.print(words, style="red", soft_wrap=True)
    if count := _not_given(summary):
        words = f"pictures that their storage did not give: {count:,}; the same command tries them again"
        stderr.print(words, style="red", soft_wrap=True)
    if errors:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in errors.items())
        stderr.note(f"rows with an error: {kinds}; --retry-errors tries them again", soft_wrap=True)
    if not arguments.json:
        took = f", {run['pictures']:,} of them now at {run['pictures_per_second']:,.1f}/s" if run["pictures"] else ""
        done = f"{summary['shards_done']:,} of {summary['shards']:,} shards"
        stdout.note(f"{summary['output']}  {summary['pictures']:,} pictures in {done}{took}", soft_wrap=True)


def _verify(arguments: argparse.Namespace) -> int:
    from tokenflow_sdk.dataset.verify import verify_job

    if arguments.inputs or arguments.output is not None:
        raise ArgumentError("--verify takes the output of a job and nothing else.", "Give --verify OUT, and its --bundle.")
    job = Job.load(Storage(arguments.verify))
    with ExitStack() as stack:
        tokenizers = [stack.enter_context(each) for each in _open(arguments)]
        with stderr.step(f"checking {job.output.address}"):
            report = verify_job(job, tokenizers[0])
    if arguments.json:
        stdout.write(f"{json.dumps(report.to_json())}\n")
    for problem in report.problems:
        stderr.print(f"error: {problem}", style="red", soft_wrap=True)
    if not arguments.json:
        stdout.print(report.sentence(), soft_wrap=True)
    return 1 if report.problems else 0
