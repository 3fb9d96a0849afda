"""Measures the time and memory of exporting a generator of the released size: hidden 4096, 32 layers, 6.7 billion weights.

It writes a checkpoint with random weights in bfloat16 shards (13.5 GB), exports it with `tokenflow export generator`, and
measures that process. With --draw, it then generates a picture with the bundle.

    python benchmarks/export_7b.py --directory build/7b --weights int8 --draw
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.common import machine, watch
from tests.support.mini_generator import PATCH_NUMS_16, generator_shapes, tokenizer_bundle, write_checkpoint

SIZES: dict[str, Any] = {
    "model_type": "llava_llama",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
}
TEXT, CODES = 32000, 32768
SHARD_BYTES = 2 * 10**9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="where to work; 25 GB, left there")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--weights")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "export_7b.json")
    arguments = parser.parse_args()
    checkpoint, tokenizer = arguments.directory / "checkpoint", arguments.directory / "tokenizer"
    if not tokenizer.exists():
        tokenizer_bundle(tokenizer, PATCH_NUMS_16, CODES)
        write_random(checkpoint, arguments.layers)
    bundle = arguments.directory / "bundle"
    words = ["generator", "--checkpoint", checkpoint, "--tokenizer", tokenizer, "--out", bundle, "--dtype", arguments.dtype]
    words += ["--weights", arguments.weights] if arguments.weights else []
    began = perf_counter()
    peak = watch([sys.executable, "-m", "tokenflow_export", *map(str, words), "--force"])
    report = {
        "machine": machine(),
        "layers": arguments.layers,
        "dtype": arguments.dtype,
        "weights": arguments.weights,
        "checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.glob("*.safetensors")),
        "bundle_bytes": sum(path.stat().st_size for path in bundle.iterdir()),
        "seconds": perf_counter() - began,
        "parity": json.loads((bundle / "bundle.json").read_text())["parity"],
    } | peak
    if arguments.draw:
        report["draw"] = draw(bundle)
    entries = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    arguments.out.write_text(json.dumps([*entries, report], indent=2) + "\n")
    print(json.dumps(report, indent=2))


def write_random(directory: Path, layers: int) -> None:
    """Write a checkpoint with random weights in the released layout: config.json, tokenizer.json, an index and 2 GB shards."""
    sizes = SIZES | {"num_hidden_layers": layers}
    shapes = generator_shapes(sizes, TEXT + 4, CODES, PATCH_NUMS_16)
    write_checkpoint(directory, sizes, {}, TEXT, CODES)
    (directory / "model.safetensors").unlink()
    generator = torch.Generator().manual_seed(0)
    where: dict[str, str] = {}
    shard: dict[str, torch.Tensor] = {}
    for key, shape in shapes.items():
        value = torch.empty(shape, dtype=torch.bfloat16)
        shard[key] = value.fill_(1) if key.endswith("norm.weight") else value.normal_(0, 0.02, generator=generator)
        if sum(tensor.nbytes for tensor in shard.values()) >= SHARD_BYTES or key == list(shapes)[-1]:
            name = f"model-{len(set(where.values())) + 1:05}.safetensors"
            save_file(shard, directory / name)
            where |= dict.fromkeys(shard, name)
            shard = {}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


def draw(bundle: Path) -> dict[str, float]:
    """Measure the seconds to open the bundle and to generate a picture, and the resident memory of this process after it."""
    import numpy as np

    from tokenflow_sdk.backends.onnxruntime import OnnxRuntimeSession
    from tokenflow_sdk.backends.session import SessionOptions
    from tokenflow_sdk.bundle.bundle import Bundle
    from tokenflow_sdk.bundle.model_config import PAGE_SIZE, GeneratorConfig
    from tokenflow_sdk.generation.scale_loop import ScaleLoop
    from tokenflow_sdk.model.sampling import PRESETS, SamplingParams
    from tokenflow_sdk.model.transformer import PagedTransformer

    began = perf_counter()
    opened = Bundle.open(bundle, GeneratorConfig)
    config, options = opened.config, SessionOptions(device="cpu")
    sessions = {name: OnnxRuntimeSession(bundle / entry.files[0].name, entry, options) for name, entry in opened.graphs.items()}
    pages = 2 * config.image_pages()
    paged = PagedTransformer(sessions["transformer"], config.layers, config.kv_heads, config.head_dim, pages, PAGE_SIZE)
    loop = ScaleLoop(config, sessions, paged, np.load(bundle / opened.asset("codebook").name, allow_pickle=False))
    ready = perf_counter()
    prompt, negative = loop.prefill(range(2, 40)), loop.prefill(range(40, 60))
    picture = loop.start(SamplingParams(passes=PRESETS["fast"], seed=0), 0, prompt, negative)
    while picture.scale < len(config.patch_nums):
        loop.sample_pass([picture])
    status = Path("/proc/self/status").read_text()
    resident = next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))
    return {"open_s": ready - began, "picture_s": perf_counter() - ready, "resident": resident}


if __name__ == "__main__":
    main()
