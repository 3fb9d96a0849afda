"""Measures `tokenflow tokenize` against the encoder alone, decoding alone, and a plain loop over `Tokenizer.encode`.

The photos are JPEG files of 500 x 400 pixels, all different, made here. The job runs as a user runs it, as a process of its
own, whose memory is watched; its rate is what it says itself, without the time in which Python starts. Every minute it is
stopped (SIGSTOP), and the other sides take a turn on some of the photos, because a machine may be a tenth slower a minute
later: the encoder alone on arrays that are decoded already, with one thread a call and as many calls at once as cores, and with
the calls of `Tokenizer`; decoding alone on all cores; and the loop. On a CPU decoding and the encoder take the same cores, so
the time that can be reached is the sum of both.

Beside it the bookkeeping of a large job is measured alone: 10,000 shards of 1,000 pictures each, none of which is read. With
Ray installed, the same job runs on Ray as well, an actor on each core.

    python benchmarks/dataset_jobs.py
    python benchmarks/dataset_jobs.py --pictures 400 --turn 100     # a try of a minute or two
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import machine
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.backends.cores import available_cores
from tokenflow_sdk.dataset.inputs import find_shards
from tokenflow_sdk.dataset.job import DoneRecord, Job
from tokenflow_sdk.dataset.job_options import JobOptions
from tokenflow_sdk.dataset.outputs import STATE
from tokenflow_sdk.dataset.storage import Storage

WIDTH, HEIGHT = 500, 400
SHARDS, ROWS = 10_000, 1_000
"""Of the job whose bookkeeping alone is measured."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", default="tiny")
    parser.add_argument("--pictures", type=int, default=20_000)
    parser.add_argument("--shard-size", type=int, default=2_000)
    parser.add_argument("--turn", type=int, default=200, help="photos of each turn of the other sides")
    parser.add_argument("--every", type=float, default=60, help="seconds of the job between two turns")
    parser.add_argument("--shards", type=int, default=SHARDS, help="of the bookkeeping")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "dataset_jobs_cpu")
    arguments = parser.parse_args()
    names = ("bundle", "pictures", "shard_size", "turn", "every")
    report: dict[str, Any] = {name: getattr(arguments, name) for name in names} | {"cores": available_cores()} | machine()
    with tempfile.TemporaryDirectory() as text:
        directory = Path(text)
        report["bookkeeping"] = bookkeeping(directory / "bookkeeping", arguments.bundle, arguments.shards)
        paths = photos(directory / "photos", arguments.pictures)
        report["photo_bytes"] = sum(path.stat().st_size for path in paths) // len(paths)
        command = ["tokenize", directory / "photos", "--bundle", arguments.bundle, "--device", "cpu", "--json"]
        command += ["--shard-size", arguments.shard_size]
        found: list[dict[str, float]] = []
        few = paths[: arguments.turn]
        with opened_sides(arguments.bundle, few) as sides:
            turn = partial(take_turn, sides, len(few), found)
            turn()
            report["job"] = run_job([*command, "-o", directory / "codes"], turn, arguments.every)
        if importlib.util.find_spec("ray") is not None:
            report["ray"] = run_job([*command, "-o", directory / "codes_ray", "--ray", "local"])
    # The job's rate is its mean, so these are means too, of the seconds that a picture takes.
    report["sides"] = {name: 1 / mean(1 / each[name] for each in found) for name in found[0]}
    report["turns"] = len(found)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n")
    text = as_markdown(report)
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


def photos(directory: Path, count: int) -> list[Path]:
    """Parts of a photo in another light, with noise: no two files are the same."""
    directory.mkdir()
    whole = Image.open(ROOT / "examples" / "chelsea.jpg").convert("RGB").resize((900, 720), Image.Resampling.BICUBIC)

    def make(number: int) -> Path:
        rng = np.random.default_rng(number)
        left, top = rng.integers(0, 900 - WIDTH), rng.integers(0, 720 - HEIGHT)
        part = whole.crop((int(left), int(top), int(left) + WIDTH, int(top) + HEIGHT))
        light = np.asarray(ImageEnhance.Brightness(part).enhance(rng.uniform(0.7, 1.2)), np.int16)
        noise = rng.integers(-6, 7, (HEIGHT, WIDTH, 1), np.int16)
        path = directory / f"{number // 1000:03d}" / f"{number:06d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.clip(light + noise, 0, 255).astype(np.uint8)).save(path, quality=90)
        return path

    with ThreadPoolExecutor(available_cores()) as pool:
        return list(pool.map(make, range(count)))


Sides = Mapping[str, Callable[[], object]]


@contextmanager
def opened_sides(bundle: str, paths: Sequence[Path]) -> Iterator[Sides]:
    """What encodes or decodes the photos in each way."""
    cores = available_cores()
    with (
        Tokenizer.from_pretrained(bundle, device="cpu") as shared,
        Tokenizer.from_pretrained(bundle, device="cpu", threads=1) as single,
    ):
        arrays = [shared.preprocess(path)[None] for path in paths]
        for tokenizer in (shared, single):
            tokenizer.encode_array(arrays[0])
        yield {
            "loop": lambda: [shared.encode(path) for path in paths],
            "encode_iter": lambda: list(shared.encode_iter(paths)),
            "decode": partial(in_threads, shared.preprocess, paths, cores),
            "encoder, one thread a call": partial(in_threads, single.encode_array, arrays, cores),
            "encoder, two calls on all cores": partial(in_threads, shared.encode_array, arrays, 2),
        }


def take_turn(sides: Sides, count: int, found: list[dict[str, float]]) -> None:
    """Add the pictures a second of each side."""
    rates = {}
    for name, call in sides.items():
        began = time.perf_counter()
        call()
        rates[name] = count / (time.perf_counter() - began)
    found.append(rates)


def in_threads(function: Callable[[Any], object], values: Sequence[Any], threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(function, values))


def run_job(words: Sequence[object], meanwhile: Callable[[], None] | None = None, every: float = 60) -> dict[str, Any]:
    """Run the command, and watch its memory. Returns what it says, its wall time, and resident bytes.

    Args:
        words: of the command.
        meanwhile: called every so many seconds, in which the command's process stands still; times are without it.
        every: seconds.

    Raises:
        SystemExit: it failed.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)]),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    began, resident, stopped = time.perf_counter(), [], 0.0
    due = began + every
    command = [sys.executable, "-m", "tokenflow_sdk.cli", *map(str, words)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        with ThreadPoolExecutor(1) as pool:
            said = pool.submit(process.stdout.read)
            while process.poll() is None:
                resident.append(resident_bytes(process.pid))
                time.sleep(0.2)
                if meanwhile is not None and time.perf_counter() > due:
                    stop = time.perf_counter()
                    process.send_signal(signal.SIGSTOP)
                    meanwhile()
                    process.send_signal(signal.SIGCONT)
                    stopped += time.perf_counter() - stop
                    due = time.perf_counter() + every
            lines = said.result().splitlines()
    wall = time.perf_counter() - began - stopped
    if process.returncode:
        raise SystemExit(process.returncode)
    # In the first quarter it grows to what it works with.
    working = resident[len(resident) // 4 :] or resident
    growth = median(working[-max(1, len(working) // 4) :]) - median(working[: max(1, len(working) // 4)])
    said_of_run: dict[str, Any] = json.loads(lines[-1])["this_run"]
    seconds = said_of_run["seconds"] - stopped
    said_of_run |= {"seconds": seconds, "pictures_per_second": said_of_run["pictures"] / seconds}
    return said_of_run | {"wall_seconds": wall, "peak_resident": max(resident), "growth": growth}


def resident_bytes(process: int) -> int:
    """Resident memory of a process; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)


def bookkeeping(directory: Path, bundle: str, shards: int) -> dict[str, Any]:
    """Seconds to begin a job and to go on with one that is done but for one shard, and the bytes of its state."""
    inputs, output = directory / "in", Storage(str(directory / "out"))
    inputs.mkdir(parents=True)
    for number in range(shards):
        (inputs / f"{number:05d}.tar").write_bytes(b"x" * (number % 7))
    with Tokenizer.from_pretrained(bundle, device="cpu") as tokenizer:
        opened = tokenizer.bundle

    def begin() -> Job:
        pattern = str(inputs / "*.tar")
        return Job.begin(output, JobOptions(), opened, [pattern], find_shards([pattern]))

    began = time.perf_counter()
    job = begin()
    start = time.perf_counter() - began
    seconds = dict.fromkeys(("read", "prepare", "encode", "write"), 123.456)
    for number in range(shards - 1):
        Path(output.path(job.file(number))).touch()
        job.finish(DoneRecord(number, 1_700_000, "ab" * 32, ROWS, {"CorruptImageError": 3}, seconds, "cuda:0"))
    began = time.perf_counter()
    again = begin()
    resume = time.perf_counter() - began
    assert len(again.done) == shards - 1
    files = [path for path in Path(output.path(STATE)).rglob("*") if path.is_file()]
    sizes = {"state_bytes": sum(path.stat().st_size for path in files)}
    sizes["state_on_disk"] = sum(path.stat().st_blocks * 512 for path in files)
    return {"shards": shards, "pictures": shards * ROWS, "start_s": start, "resume_s": resume} | sizes


def as_markdown(report: dict[str, Any]) -> str:
    sides, job, kept = report["sides"], report["job"], report["bookkeeping"]
    rate = job["pictures_per_second"]
    encoder = max(sides["encoder, one thread a call"], sides["encoder, two calls on all cores"])
    reachable = 1 / (1 / encoder + 1 / sides["decode"])
    lines = [
        "# `tokenflow tokenize`",
        "",
        f"{report['cpu']}, {report['cores']} cores; Python {report['python']}, onnxruntime {report['onnxruntime']}; "
        f"{report['bundle']}, float32. {report['pictures']:,} JPEG photos of {WIDTH} x {HEIGHT} px, "
        f"{report['photo_bytes']:,} bytes each, in shards of {report['shard_size']:,}; other sides: means of "
        f"{report['turns']} turns of {report['turn']} photos, for which the job stood still every {report['every']:g} s. "
        f"`python benchmarks/dataset_jobs.py --pictures {report['pictures']} --shard-size {report['shard_size']} "
        f"--turn {report['turn']} --every {report['every']:g}`.",
        "",
        "| | pictures a second | the job against it |",
        "| --- | --- | --- |",
        f"| the job | {rate:.1f} | |",
        *(f"| {name} | {value:.1f} | {rate / value:.2f}x |" for name, value in sides.items()),
        f"| reachable: decoding and the encoder on the same cores | {reachable:.1f} | {rate / reachable:.0%} |",
    ]
    if "ray" in report:
        other = report["ray"]["pictures_per_second"]
        lines.append(f"| the job on Ray, an actor a core, with their start | {other:.1f} | {rate / other:.2f}x |")
    lines += [
        "",
        f"Memory of the job: {job['peak_resident'] / 1e6:,.0f} MB at most; from its second to its last quarter it grew by "
        f"{job['growth'] / 1e6:,.1f} MB. It took {job['wall_seconds']:.1f} s from the command to its end, "
        f"{job['seconds']:.1f} s of them for pictures.",
        "",
        f"Bookkeeping alone, {kept['pictures']:,} pictures in {kept['shards']:,} shards: {kept['start_s']:.2f} s to begin, "
        f"{kept['resume_s']:.2f} s to go on when all but one are done; its state has {kept['state_bytes'] / 1e6:.1f} MB, "
        f"{kept['state_on_disk'] / 1e6:.1f} MB on disk.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
