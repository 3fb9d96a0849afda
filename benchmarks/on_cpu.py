"""Measures encode and decode on this machine's processor: PyTorch in three ways, onnxruntime as it is, and this SDK.

The sides of a row take turns in one process, one picture a call, and medians are compared; beside a time stands the share of
codes that are this SDK's, or the PSNR against its picture. A row is stored in `results/cpu/MACHINE.json` as soon as it is
measured, so a run that was interrupted goes on with the next row. `results/cpu.md` has the rows of all machines. The full-size
models have stand-in weights, which take as long; of `tiny` there is no PyTorch checkpoint. A decoder in 8 bits is measured of
bundles that were calibrated.

    python benchmarks/on_cpu.py
    python benchmarks/on_cpu.py --variants tiny clipb_256 --seconds 10

    tokenflow export calibrate bundles/clipb_256 --images photos/ --crops 4
    python benchmarks/on_cpu.py --variants clipb_256 --again
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import machine, prepare, random_codes
from benchmarks.gpu.codecs import Codec, TorchCodec, half_copy, load_eager
from benchmarks.gpu.device import Device
from benchmarks.gpu.timing import Pace, Times, alternate, bar
from recipes.tiny.loop import has_bfloat16 as torch_has_bfloat16
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.backends.cores import available_cores, instruction_sets
from tokenflow_sdk.backends.onnxruntime import import_onnxruntime
from tokenflow_sdk.backends.openvino import has_bfloat16
from tokenflow_sdk.bundle.bundle import Bundle, find_bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig
from tokenflow_sdk.engines.annotations import RANGES
from tokenflow_sdk.errors import EngineRefusedError, TokenFlowError
from tokenflow_sdk.pictures.images import preprocess, psnr

VARIANTS = ("tiny", "clipb_256", "siglip_384")
SIDES = {
    "torch": "PyTorch",
    "torch-bf16": "PyTorch, bfloat16",
    "compile": "PyTorch, compiled",
    "onnxruntime": "onnxruntime",
    "openvino": "this SDK on OpenVINO",
    "ours": "this SDK",
    "ours-bf16": "this SDK in bfloat16",
    "ours-int8": "this SDK, decoder in int8",
}
EXACT = ("ours", "openvino")
ROUNDED = ("ours-bf16", "ours-int8")
GRAPHS = ("encode", "decode")
Function = Callable[[NDArray[Any]], NDArray[Any]]
Side = dict[str, Function]
"""What `Tokenizer.encode_array` and `decode_array` do, under the names of the graphs."""


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=VARIANTS, choices=VARIANTS)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--seconds", type=float, default=40.0, help="for the calls of a row; each side has at least 5")
    parser.add_argument("--again", action="store_true", help="measure the rows of --variants that are there already as well")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "cpu")
    arguments = parser.parse_args(words)
    about = machine() | {"cores": arguments.threads, "instruction_sets": instruction_sets()}
    path = arguments.out / f"{Device().slug}-{arguments.threads}.json"
    report = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    for variant in arguments.variants:
        if arguments.again:
            report["rows"] = {name: row for name, row in report["rows"].items() if name.partition(" ")[0] != variant}
        missing = [graph for graph in GRAPHS if f"{variant} {graph}" not in report["rows"]]
        if not missing:
            continue
        with sides(variant, arguments.threads) as (config, opened):
            for graph in missing:
                with bar(f"{variant}: {graph}") as advance:
                    row = measured(config, opened, graph, Pace(50, arguments.seconds), advance)
                report["rows"][f"{variant} {graph}"] = row
                arguments.out.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(report | {"machine": about}, indent=1) + "\n")
    text = page(json.loads(each.read_text()) for each in sorted(arguments.out.glob("*.json")))
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


@contextmanager
def sides(variant: str, threads: int) -> Iterator[tuple[TokenizerConfig, dict[str, Side]]]:
    """Open the sides of a model; its checkpoint and its bundle are made if they are not there."""
    bundle, checkpoint = ROOT / "bundles" / variant, ROOT / "checkpoints" / f"{variant}.pt"
    if variant == "tiny":
        bundle = find_bundle(variant, TokenizerConfig.kind)
    else:
        prepare(variant, checkpoint, bundle)
    ways: dict[str, dict[str, Any]] = {"ours": {"backend": "onnxruntime"}}
    if importlib.util.find_spec("openvino"):
        ways |= {"openvino": {"backend": "openvino"}} | ({"ours-bf16": {"build_config": "cpu-bf16"}} if has_bfloat16() else {})
    with ExitStack() as stack:

        def opens(**way: Any) -> Tokenizer:
            return stack.enter_context(Tokenizer.from_pretrained(bundle, device="cpu", threads=threads, **way))

        def decoder(build_config: str) -> Function:
            try:
                return opens(build_config=build_config).decode_array
            except TokenFlowError as error:
                return partial(raises, error)

        opened: dict[str, Tokenizer] = {}
        refused: dict[str, Side] = {}
        for side, way in ways.items():
            try:
                opened[side] = opens(**way)
            except EngineRefusedError as error:
                # Rounding changes codes; pictures may be near enough.
                refused[side] = {"encode": partial(raises, error), "decode": decoder("cpu-bf16-decoder")}
        config = opened["ours"].config
        codecs: dict[str, Codec] = (
            {**opened} if variant == "tiny" else {**opened, **eager(variant, checkpoint, config, threads)}
        )
        found: dict[str, Side] = {
            side: {"encode": codec.encode_array, "decode": codec.decode_array} for side, codec in codecs.items()
        }
        found |= refused | {"onnxruntime": plain(bundle, threads)}
        if "openvino" in ways and RANGES in Bundle.open(bundle, TokenizerConfig).assets:
            found["ours-int8"] = {"decode": decoder("cpu-int8-decoder")}
        yield config, {side: found[side] for side in SIDES if side in found}


def raises(error: Exception, _: object) -> NDArray[Any]:
    """A side that was refused: its rows say why."""
    raise error


def eager(variant: str, checkpoint: Path, config: TokenizerConfig, threads: int) -> dict[str, TorchCodec]:
    """PyTorch as it is, in bfloat16 where the processor has it, and compiled."""
    device = Device(threads)
    model = load_eager(checkpoint, variant, device)
    codecs = {"torch": TorchCodec(model, config, device), "compile": TorchCodec(model, config, device, compiled=True)}
    if torch_has_bfloat16(device.torch):
        codecs["torch-bf16"] = TorchCodec(half_copy(model, torch.bfloat16), config, device)
    return codecs


def plain(bundle: Path, threads: int) -> Side:
    """The bundle's graphs in onnxruntime with its defaults, without what the SDK does to them when it opens them."""
    ort = import_onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads

    def run(session: Any, array: NDArray[Any]) -> NDArray[Any]:
        found: NDArray[Any] = session.run(None, {session.get_inputs()[0].name: array})[0]
        return found

    opened = {graph: ort.InferenceSession(str(bundle / f"{graph}.onnx"), options, ["CPUExecutionProvider"]) for graph in GRAPHS}
    return {graph: partial(run, session) for graph, session in opened.items()}


def measured(
    config: TokenizerConfig, opened: Mapping[str, Side], graph: str, pace: Pace, advance: Callable[[], None]
) -> dict[str, dict[str, Any]]:
    """The median seconds of each side, and what its result is against this SDK's; or why there is none."""
    picture = preprocess(ROOT / "examples" / "chelsea.jpg", config.image_size, config.preprocess)[None]
    array = picture if graph == "encode" else random_codes(config.codebook_size, config.n_codes)
    results: dict[str, NDArray[Any]] = {}

    def call(side: str) -> float:
        results[side] = opened[side][graph](array)
        return 0.0

    times = alternate({side: partial(call, side) for side in opened if graph in opened[side]}, lambda: None, pace, advance)
    row: dict[str, dict[str, Any]] = {}
    for side, found in times.items():
        if isinstance(found, Times):
            same = float((results[side] == results["ours"]).mean())
            close = {"same": same} if graph == "encode" else {"psnr": min(99.0, psnr(results[side], results["ours"]))}
            row[side] = {"seconds": found.median, "calls": len(found.seconds)} | close
        else:
            row[side] = {"why": found}
    return row


def page(reports: Iterable[Mapping[str, Any]]) -> str:
    """One table of the rows of several machines."""
    lines = [
        "# Encode and decode on processors",
        "",
        "One picture a call, sides in turns, medians; float32 unless it says otherwise. In brackets the share of codes that",
        "are this SDK's in float32, or the PSNR against its picture. A code that flips changes what finer scales get; so that",
        "share is below the one of the certificate, which is teacher-forced. The last columns are against PyTorch in float32:",
        "the best of onnxruntime and OpenVINO, which `tokenflow bench --choose` finds, and the faster of bfloat16 and int8.",
        "Where bfloat16 is refused for its codes, decode is with `cpu-bf16-decoder`; int8 is `cpu-int8-decoder`.",
        "Written by `python benchmarks/on_cpu.py`; `cpu/` has each machine's figures.",
        "",
        f"| | {' | '.join(SIDES.values())} | exact | in fewer bits |",
        f"|{' --- |' * (len(SIDES) + 3)}",
    ]
    for report in reports:
        m = report["machine"]
        versions = f"torch {m['torch']}, onnxruntime {m['onnxruntime']}"
        about = ", ".join([m["cpu"], f"{m['cores']} cores", *m["instruction_sets"], versions])
        lines.append(f"| **{about}** |{' |' * (len(SIDES) + 2)}")
        for name, row in report["rows"].items():
            ratios = (ratio(row, EXACT), ratio(row, ROUNDED))
            lines.append(f"| {name} | {' | '.join([*(cell(row.get(side)) for side in SIDES), *ratios])} |")
    return "\n".join([*lines, ""])


def ratio(row: Mapping[str, Any], sides: Sequence[str]) -> str:
    """How many times as fast as PyTorch the fastest of some sides is."""
    seconds = [row[side]["seconds"] for side in sides if "seconds" in row.get(side, {})]
    return f"{row['torch']['seconds'] / min(seconds):.2f}x" if seconds and "seconds" in row.get("torch", {}) else ""


def cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    if "why" in found:
        return str(found["why"])
    against = f"{found['same']:.1%}" if "same" in found else f"{found['psnr']:.0f} dB"
    return f"{found['seconds'] * 1e3:,.0f} ms ({against})"


if __name__ == "__main__":
    main()
