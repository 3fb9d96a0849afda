"""Runs a job on a Ray cluster: actors with a tokenizer each make shards, and Ray gives that of a dead one to another."""

from __future__ import annotations

import importlib
import inspect
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from tokenflow_sdk.dataset.inputs import Shard
from tokenflow_sdk.dataset.job import DoneRecord, Job
from tokenflow_sdk.dataset.progress import FailedShard, Progress, Snapshot
from tokenflow_sdk.dataset.shard_run import Encoder, run_shard
from tokenflow_sdk.errors import ArgumentError, BackendError, MissingPackageError, TokenFlowError
from tokenflow_sdk.tokenizer import Tokenizer

__all__ = ["require_ray", "run_on_ray"]

_logger = logging.getLogger("tokenflow_sdk")
_TRIES = 3
"""How often an actor may die, and a shard be given to another, before it counts as failed."""


def require_ray() -> None:
    """Raise MissingPackageError if Ray is not installed."""
    try:
        importlib.import_module("ray.data")
    except ImportError as error:
        hint = "Run `pip install 'ray[data]'`."
        raise MissingPackageError(f"--ray needs Ray, which is not installed ({error}).", hint) from error


def run_on_ray(
    job: Job,
    tokenizer: Tokenizer,
    shards: Sequence[Shard],
    address: str,
    on_progress: Callable[[Snapshot], None] = lambda snapshot: None,
    cores: int = 1,
) -> Progress:
    """Make shards on a Ray cluster: one actor on each GPU, or on a cluster without GPUs one for each `cores` cores.

    Inputs, output and the bundle must be there under the same names on all machines of the cluster, and the SDK installed.

    Args:
        job: whose shards they are.
        tokenizer: of the job's bundle; each actor opens a copy.
        shards: to make.
        address: of the cluster, as `ray.init` takes it: `auto` is the one that this machine is of, `local` a new one.
        on_progress: called when a shard is made.
        cores: of each actor that has no GPU.

    Raises:
        MissingPackageError: ray is not installed.
        ArgumentError: there is no cluster at the address.
        BackendError: Ray ended the job, e.g. because no actor could open the tokenizer.
    """
    with _connected(address) as ray:
        gpus, cpus = (int(ray.cluster_resources().get(name, 0)) for name in ("GPU", "CPU"))
        # Its share of the cores, which decode pictures while the GPU encodes others.
        workers = max(1, cpus // gpus) if gpus else 1
        actors, resources = (gpus, {"num_gpus": 1}) if gpus else (max(1, cpus // cores), {"num_cpus": cores})
        progress = Progress(shards, dict.fromkeys(("read", "prepare", "encode", "write"), actors))
        items = [{"shard": json.dumps(shard.to_json()), "done": _as_text(job.done.get(shard.index))} for shard in shards]
        lanes = 2 if gpus else 1
        made = _made(items, (tokenizer, _without_shards(job), workers, lanes), min(actors, len(items)), resources)
        try:
            for row in made.iter_rows():
                _count(job, progress, row)
                on_progress(progress.snapshot())
        except ray.exceptions.RayError as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise BackendError(f"Ray ended the job: {lines[-1]}", "Look into Ray's logs; the same command goes on.") from error
    # Of actors that were killed. None is there any more.
    job.delete_leftovers(shards)
    progress.fail_unseen(shards, f"The process that made it died {_TRIES + 1} times. Look into Ray's logs.")
    return progress


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Give the module `ray`, connected to a cluster within the block. Errors as in `run_on_ray`."""
    require_ray()
    import ray

    try:
        ray.init(address=address, ignore_reinit_error=True, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ArgumentError(
            f"There is no Ray cluster at --ray {address}: {error}", "Start one with `ray start --head`, or give --ray local."
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _made(items: list[dict[str, str]], arguments: tuple[Any, ...], actors: int, resources: dict[str, int]) -> Any:
    """A Ray data set of what actors, made with these arguments, say of the shards in `items`; reading it makes them."""
    from ray.data import ActorPoolStrategy, DataContext, from_items

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    # A shard whose actor dies each time does not end the others.
    context.max_errored_blocks = -1
    queue = from_items(items, override_num_blocks=len(items))
    with warnings.catch_warnings():
        # Ray 2.64 will no longer be told how often, and try for ever.
        warnings.simplefilter("ignore")
        limited = "ray_remote_args_fn" in inspect.signature(queue.map_batches).parameters
        return queue.map_batches(
            _Actor,
            fn_constructor_args=arguments,
            batch_size=1,
            compute=ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1),
            **({"ray_remote_args_fn": _limits} if limited else {}),
            **resources,
        )


def _limits() -> dict[str, int]:
    return {"max_restarts": _TRIES, "max_task_retries": _TRIES}


def _count(job: Job, progress: Progress, row: dict[str, Any]) -> None:
    """Take what an actor says of its shard."""
    if row["error"]:
        progress.fail(FailedShard.of(job.shards[row["shard"]], row["error"]))
        return
    record = DoneRecord(**json.loads(row["record"]))
    job.done[record.shard] = record
    progress.done(record)
    progress.stages.add(record.seconds)


def _without_shards(job: Job) -> Job:
    """A job for an actor, which gets each shard as it is to make it."""
    return Job(job.output, job.options, job.bundle_sha256, job.inputs, ())


def _as_text(record: DoneRecord | None) -> str:
    return "" if record is None else json.dumps(asdict(record))


class _Actor:
    """Makes shards with a tokenizer of its own.

    Args:
        tokenizer: a copy, which opens here.
        job: without shards.
        workers: threads that prepare pictures.
        lanes: calls of the engine at once.
    """

    def __init__(self, tokenizer: Tokenizer, job: Job, workers: int, lanes: int) -> None:
        self._encoder, self._job = Encoder.fitting(tokenizer, job.options, workers, lanes), job

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Make the one shard of a batch."""
        shard = Shard.from_json(json.loads(str(batch["shard"][0])))
        before = str(batch["done"][0])
        self._job.done = {shard.index: DoneRecord(**json.loads(before))} if before else {}
        record, problem = None, ""
        try:
            record = run_shard(self._encoder, self._job, shard)
        except (TokenFlowError, OSError) as error:
            problem = str(error)
        except Exception as error:
            _logger.exception("Shard %05d failed in a way that nobody has thought of; please report it.", shard.index)
            problem = f"{type(error).__name__}: {error}"
        return {"shard": [shard.index], "record": [_as_text(record)], "error": [problem]}
