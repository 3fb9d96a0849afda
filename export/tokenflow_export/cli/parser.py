"""The exporter's command line: its words and their help."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import TypeAlias

from tokenflow_export.cli import bundles, precision, standin
from tokenflow_export.models.config import VARIANTS
from tokenflow_sdk.bundle.bundle import TINY, find_bundle
from tokenflow_sdk.bundle.hub import is_hub_id
from tokenflow_sdk.cli.help import Parser, add_command

__all__ = ["make_parser"]

_Words: TypeAlias = "argparse._SubParsersAction[Parser]"

_DESCRIPTION = """\
Turn a released PyTorch checkpoint into a bundle: ONNX graphs and a bundle.json
that tokenflow_sdk runs without torch.

  tokenflow export tokenizer --checkpoint tokenflow_clipb_32k_enhanced.pt \\
      --out bundles/clipb_256
  tokenflow export generator --checkpoint TokenFlow-t2i/ \\
      --tokenizer bundles/clipb_256 --out bundles/t2i
  tokenflow export understanding --checkpoint TokenFlow-llava/ \\
      --tokenizer bundles/siglip_384 --out bundles/chat
  tokenflow export precision-search bundles/clipb_256 --images photos/
  tokenflow export calibrate bundles/clipb_256 --images photos/
  tokenflow export inspect bundles/clipb_256 decode
  tokenflow export standin --variant clipb_256 --out checkpoints/clipb_256.pt
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser; each command's namespace carries its function as `run`."""
    parser = Parser("tokenflow export", description=_DESCRIPTION)
    words = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_exporting(words)
    _add_searching(words)
    _add_calibrating(words)
    _add_inspecting(words)
    made = add_command(
        words, "standin", "write a full-size checkpoint of stand-in weights, to try everything without a download"
    )
    made.add_argument(
        "--variant",
        choices=list(VARIANTS),
        default="clipb_256",
        metavar="NAME",
        help=f"{', '.join(VARIANTS)} (default: %(default)s)",
    )
    made.add_argument("--out", required=True, type=Path, help="the .pt file; must not exist yet")
    made.set_defaults(run=standin.standin)
    return parser


def _add_exporting(words: _Words) -> None:
    tokenizer = add_command(words, "tokenizer", "convert a tokenizer checkpoint to a bundle")
    tokenizer.add_argument("--checkpoint", required=True, help=".pt or .safetensors file, or hf://org/repo/file")
    tokenizer.add_argument(
        "--variant",
        choices=list(VARIANTS),
        metavar="NAME",
        help=f"{', '.join(VARIANTS)}: settles whether a CLIP tokenizer runs at 224 or 256 px; else recognised",
    )
    tokenizer.add_argument(
        "--images", type=Path, metavar="DIR", help="pictures to compare with PyTorch too; they are not stored in the bundle"
    )
    _add_output(tokenizer)
    tokenizer.set_defaults(run=bundles.tokenizer)
    generator = add_command(words, "generator", "convert a text-to-image directory to a bundle")
    _add_language_model(generator, "the bundle of the tokenizer that decodes its codes")
    generator.set_defaults(run=bundles.generator)
    understanding = add_command(words, "understanding", "convert a LLaVA directory (Qwen2 or Llama layout) to a bundle")
    _add_language_model(understanding, "the bundle of the tokenizer whose codes it reads")
    without = "compare with the exporter's own model, not with transformers, which reads the checkpoint by itself"
    understanding.add_argument("--without-transformers", action="store_true", help=without)
    understanding.set_defaults(run=bundles.understanding)


def _add_language_model(parser: argparse.ArgumentParser, tokenizer: str) -> None:
    parser.add_argument("--checkpoint", required=True, type=Path, help="the released Hugging Face directory")
    parser.add_argument("--tokenizer", required=True, type=_bundle_directory, help=tokenizer)
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16"), default="fp32", help="of the arithmetic; fp16 is for GPUs (default: %(default)s)"
    )
    unknown = (
        "a key of config.json that the exporter does not know and that changes nothing that the model computes; repeatable"
    )
    parser.add_argument("--ignore-key", action="append", default=[], metavar="KEY", help=unknown)
    weights = "store the transformer's weights in fewer bits; int8 is the fast one on CPUs"
    parser.add_argument("--weights", choices=("int8", "int4"), help=weights)
    _add_output(parser)


def _bundle_directory(name: str) -> Path:
    """The path of a bundle: exports write into bundles, or remember where one lies, so names of bundles are refused."""
    if name == TINY and not os.path.lexists(name):
        copied = shlex.quote(str(find_bundle(TINY, "tokenizer")))
        raise argparse.ArgumentTypeError(f"{name} is a name, and a directory is needed here; copy {copied} and give the copy")
    if is_hub_id(name):
        command = f"`hf download {name} --local-dir DIR`"
        raise argparse.ArgumentTypeError(f"there is no directory {name}; if it is on the hub, run {command} and give DIR")
    return Path(name)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=Path, help="the bundle's directory; must not exist yet")
    parser.add_argument("--force", action="store_true", help="replace --out if it exists")
    parser.add_argument(
        "--license",
        metavar="NAME",
        help="licence of the weights, e.g. apache-2.0; stored in the bundle and its model card (default: not recorded)",
    )


def _add_searching(words: _Words) -> None:
    parser = add_command(
        words, "precision-search", "measure what half precision costs, and find the nodes that must stay in float32 in engines"
    )
    bundle = "of a tokenizer or a generator; the nodes to pin and the figures are stored in it"
    parser.add_argument("bundle", type=_bundle_directory, metavar="BUNDLE", help=bundle)
    parser.add_argument("--precision", choices=("fp16", "bf16"), default="fp16", help="of the engines (default: %(default)s)")
    parser.add_argument("--images", type=Path, metavar="DIR", help="photos to measure a tokenizer on")
    parser.add_argument("--crops", type=int, default=24, metavar="N", help="crops of the photos (default: %(default)s)")
    parser.add_argument(
        "--decoded", type=int, metavar="N", help="how many crops are decoded too, which takes the longest (default: all)"
    )
    parser.add_argument(
        "--agreement", type=float, default=0.975, help="least teacher-forced code agreement in any scale (default: %(default)s)"
    )
    parser.set_defaults(run=precision.precision_search)


def _add_calibrating(words: _Words) -> None:
    parser = add_command(
        words, "calibrate", "take the ranges that engines with a decoder in int8 or fp8 need, and measure what 8 bits cost"
    )
    bundle = "of a tokenizer; the ranges and the figures are stored in it"
    parser.add_argument("bundle", type=_bundle_directory, metavar="BUNDLE", help=bundle)
    parser.add_argument("--images", required=True, type=Path, metavar="DIR", help="photos to take ranges from")
    parser.add_argument(
        "--held-out",
        type=Path,
        metavar="DIR",
        help="photos to measure on (default: every fourth of --images, kept out of the ranges)",
    )
    parser.add_argument("--crops", type=int, default=64, metavar="N", help="crops of each set (default: %(default)s)")
    parser.set_defaults(run=precision.calibrate)


def _add_inspecting(words: _Words) -> None:
    parser = add_command(
        words, "inspect", "print which tensors of a graph in half precision, or in TensorRT, differ from float32 in onnxruntime"
    )
    parser.add_argument("bundle", type=_bundle_directory, metavar="BUNDLE", help="of a tokenizer")
    parser.add_argument("graph", choices=("encode", "decode", "semantic", "features"), help="one of its graphs")
    parser.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp16", help="default: %(default)s")
    parser.add_argument(
        "--backend", choices=("onnxruntime", "tensorrt", "tensorrt-rtx"), default="onnxruntime", help="default: %(default)s"
    )
    parser.add_argument("--top", type=int, default=20, metavar="N", help="tensors to show (default: %(default)s)")
    parser.set_defaults(run=precision.inspect)
