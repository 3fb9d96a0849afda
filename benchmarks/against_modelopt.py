"""Compares our graph passes with NVIDIA's ModelOpt on the bundled model: half precision and Q/DQ, without a GPU.

Both convert the same float32 graphs, and both results are computed as engines compute them. ModelOpt gets eight crops, or the
generator's reference prompt, to classify nodes by. It runs in an environment of its own, because it pins other versions of onnx
and onnxruntime, and on copies, because it rewrites graphs that it reads.

    python -m venv modelopt && modelopt/bin/pip install 'nvidia-modelopt[onnx]==0.47.0'
    python benchmarks/against_modelopt.py --photos data/tiny/photos --modelopt modelopt/bin/python
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tokenflow_export.precision.calibrate import QUANTILES, magnitudes
from tokenflow_export.precision.emulate_half import emulate
from tokenflow_export.precision.search import crops
from tokenflow_export.progress import ProgressSteps
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig, TokenizerConfig
from tokenflow_sdk.engines.build import rewrite_for_engine
from tokenflow_sdk.parity.tokenizer import TokenizerReference, forced_agreement
from tokenflow_sdk.passes.dequantize import dequantize
from tokenflow_sdk.passes.graph import drop_unused, load_graph
from tokenflow_sdk.passes.quantize import ActivationRanges, inner_convolutions
from tokenflow_sdk.pictures.images import psnr

CALIBRATED_ON = 8
"""Crops that ranges and ModelOpt's classification come from; results are judged on the others."""
SHIFTS = (0, 200, 1000, 4000)
"""What is added to the positions of the generator's prompt."""

AUTOCAST = """
import json, sys, onnx
from modelopt.onnx.autocast import convert_to_mixed_precision
from time import perf_counter
graph, dtype, data, out = json.loads(sys.argv[1])
start = perf_counter()
model = convert_to_mixed_precision(graph, dtype, keep_io_types=True, calibration_data=data)
seconds = perf_counter() - start
onnx.save(model, out)
print(seconds)
"""
"""Half precision, in ModelOpt's environment. Prints the seconds that it took, last."""
QUANTIZE = """
import json, sys, numpy
from modelopt.onnx.quantization import quantize
graph, mode, codes, out, chosen = json.loads(sys.argv[1])
quantize(graph, mode, {"code_indices": numpy.load(codes)}, calibration_eps=["cpu"], output_path=out, **chosen)
"""
"""Q/DQ, in ModelOpt's environment."""

Feeds = dict[str, NDArray[Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "tiny")
    parser.add_argument("--photos", type=Path, required=True, help="directory of pictures")
    parser.add_argument("--modelopt", type=Path, required=True, help="Python that has nvidia-modelopt[onnx]")
    parser.add_argument("--crops", type=int, default=24)
    arguments = parser.parse_args()
    bundle = Bundle.open(arguments.model / "tokenizer", TokenizerConfig)
    photos = crops(sorted(arguments.photos.iterdir()), CALIBRATED_ON + arguments.crops, bundle.config.image_size)
    with tempfile.TemporaryDirectory() as work:
        directory = Path(work)
        codes = np.concatenate([run(bundle.graph_path("encode"), {"images": photo[None]}, "code_indices") for photo in photos])
        compare_half(bundle, photos, codes, directory, arguments.modelopt)
        compare_eight_bits(bundle, codes, directory, arguments.modelopt)
        compare_positions(arguments.model / "generator", directory, arguments.modelopt)


def compare_half(
    bundle: Bundle[TokenizerConfig], photos: NDArray[Any], codes: NDArray[Any], directory: Path, python: Path
) -> None:
    codebook = TokenizerReference.load(bundle).codebook
    judged = codes[CALIBRATED_ON:]

    def agreement(found: NDArray[Any], exact: NDArray[Any]) -> str:
        shares = forced_agreement(found, judged, codebook, bundle.config)
        return f"{np.average(shares, weights=np.square(bundle.config.patch_nums)):.3%}, {min(shares):.3%} in the worst scale"

    for name, key, rows, output, figure in (
        ("encode", "images", photos, "latent", agreement),
        ("decode", "code_indices", codes, "images", decibels),
    ):
        feeds = [{key: row[None]} for row in rows]
        graph = directory / f"{name}.onnx"
        write(folded(bundle.graph_path(name)), graph)
        exact = run_all(graph, feeds[CALIBRATED_ON:], output)
        for dtype in ("fp16", "bf16"):
            for side, convert in (("ours", ours), ("ModelOpt", partial(modelopts, python=python, feeds=feeds[:CALIBRATED_ON]))):
                model, seconds = convert(graph, dtype)
                emulated = directory / "emulated.onnx"
                write(as_engines_compute(model, dtype), emulated)
                text = figure(run_all(emulated, feeds[CALIBRATED_ON:], output), exact)
                print(f"{name} {dtype} {side}: {text}; {seconds:.2f} s", flush=True)


def compare_eight_bits(bundle: Bundle[TokenizerConfig], codes: NDArray[Any], directory: Path, python: Path) -> None:
    graph, result, given = directory / "decode.onnx", directory / "quantized.onnx", directory / "codes.npy"
    np.save(given, codes[:CALIBRATED_ON])
    feeds = [{"code_indices": row[None]} for row in codes[CALIBRATED_ON:]]
    exact = run_all(graph, feeds, "images")
    ranges = magnitudes(bundle, codes[:CALIBRATED_ON], QUANTILES, ProgressSteps())
    inner = [f"^{name}$" for name in inner_convolutions(load_graph(graph))]
    for mode in ("int8", "fp8"):
        for index, quantile in enumerate(QUANTILES):
            model = load_graph(graph)
            rewrite_for_engine(model, "fp16", (), ActivationRanges(mode, {name: row[index] for name, row in ranges.items()}))
            write(model, result)
            print(f"{mode} ours, quantile {quantile}: {decibels(run_all(result, feeds, 'images'), exact)}", flush=True)
        for what, chosen in (
            ("its own choice", {}),
            ("all convolutions", {"op_types_to_quantize": ["Conv"]}),
            ("our convolutions", {"op_types_to_quantize": ["Conv"], "nodes_to_quantize": inner}),
        ):
            in_modelopt(python, QUANTIZE, [str(graph), mode, str(given), str(result), chosen])
            print(f"{mode} ModelOpt, {what}: {decibels(run_all(result, feeds, 'images'), exact)}", flush=True)


def compare_positions(generator: Path, directory: Path, python: Path) -> None:
    """Hidden states of a prompt whose positions are shifted, which rotary embeddings do not feel but for rounding."""
    model = load_graph(generator / "transformer.onnx")
    dequantize(model)
    graph, emulated = directory / "transformer.onnx", directory / "emulated.onnx"
    write(model, graph)
    feeds = prompt_feeds(generator)
    for dtype in ("fp16", "bf16"):
        for side, convert in (("ours", ours), ("ModelOpt", partial(modelopts, python=python, feeds=[feeds]))):
            write(as_engines_compute(convert(graph, dtype)[0], dtype), emulated)
            for shift in SHIFTS:
                moved = feeds | {"positions": feeds["positions"] + np.int32(shift)}
                exact, found = (run(path, moved, "hidden") for path in (graph, emulated))
                cosine = (exact * found).sum(-1) / np.linalg.norm(exact, axis=-1) / np.linalg.norm(found, axis=-1)
                print(f"transformer {dtype} {side}, positions + {shift}: a cosine of {cosine.min():.5f}", flush=True)


def ours(graph: Path, dtype: Any) -> tuple[ir.Model, float]:
    """Our result, and the seconds that it took."""
    start = perf_counter()
    model = load_graph(graph)
    rewrite_for_engine(model, dtype)
    return model, perf_counter() - start


def modelopts(graph: Path, dtype: str, python: Path, feeds: Sequence[Feeds]) -> tuple[ir.Model, float]:
    """ModelOpt's result, with types inferred anew and without the shapes it declares, with which onnxruntime fails."""
    with tempfile.TemporaryDirectory() as data:
        for number, feed in enumerate(feeds):
            np.savez(Path(data) / f"{number}.npz", allow_pickle=False, **feed)
        result = Path(data) / "result.onnx"
        seconds = in_modelopt(python, AUTOCAST, [str(graph), dtype, data, str(result)])
        proto = onnx.load(result)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True))
    for node in model.graph:
        for value in node.outputs:
            if not value.is_graph_output():
                value.shape = None
    return model, float(seconds)


def in_modelopt(python: Path, code: str, arguments: list[Any]) -> str:
    """Run code in ModelOpt's environment; its last line."""
    command = [str(python.absolute()), "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return done.stdout.splitlines()[-1] if done.stdout else ""


def folded(graph: Path) -> ir.Model:
    """A graph with float32 weights in the place of casts of float16 ones, which ModelOpt does not see through."""
    model = load_graph(graph)
    for node in [node for node in model.graph if node.op_type == "Cast"]:
        source, result = node.inputs[0], node.outputs[0]
        if source is not None and source.const_value is not None and result.dtype == ir.DataType.FLOAT:
            tensor = ir.Tensor(source.const_value.numpy().astype(np.float32), name=f"{result.name}_folded")
            value = ir.Value(name=tensor.name, const_value=tensor, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
            model.graph.register_initializer(value)
            ir.convenience.replace_all_uses_with(result, value)
            model.graph.remove(node, safe=True)
    drop_unused(model)
    return model


def as_engines_compute(model: ir.Model, dtype: Any) -> ir.Model:
    emulate(model, dtype)
    return model


def write(model: ir.Model, path: Path) -> None:
    onnx.save(ir.to_proto(model), path)


def run(graph: Path, feeds: Feeds, output: str) -> NDArray[Any]:
    return run_all(graph, [feeds], output)


def run_all(graph: Path, feeds: Sequence[Feeds], output: str) -> NDArray[Any]:
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run([output], feed)[0] for feed in feeds])


def decibels(found: NDArray[Any], exact: NDArray[Any]) -> str:
    each = [psnr(a, b) for a, b in zip(found, exact, strict=True)]
    return f"{min(each):.1f} dB at least, {np.mean(each):.1f} dB on average"


def prompt_feeds(generator: Path) -> Feeds:
    """What the transformer is given for the prompt of the bundle's reference."""
    ids = np.load(generator / "reference.npz")["token_ids"][None]
    order = np.arange(ids.size, dtype=np.int32)[None]
    embeddings = run(generator / "embed_text.onnx", {"token_ids": ids, "starts": np.zeros(ids.shape, np.float32)}, "embeddings")
    config = Bundle.open(generator, GeneratorConfig).config
    pages = np.zeros((1, ids.size, config.kv_heads, config.head_dim), np.float32)
    return {
        "embeddings": embeddings,
        "positions": order,
        "visible": order + 1,
        "context": np.zeros(1, np.int32),
        "block_tables": np.zeros((1, 1), np.int32),
        "k_pages": pages,
        "v_pages": pages,
    }


if __name__ == "__main__":
    main()
