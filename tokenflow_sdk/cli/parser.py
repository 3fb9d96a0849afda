"""The command line's subparsers and their help."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias, get_args

from tokenflow_sdk import __version__
from tokenflow_sdk.backends.tensorrt_module import FLAVOURS
from tokenflow_sdk.cli import ask, bench, build, commands, generate, info, verify
from tokenflow_sdk.engines.build_config import build_config_names
from tokenflow_sdk.engines.options import BACKENDS
from tokenflow_sdk.passes.quantize import EightBit
from tokenflow_sdk.pictures.images import PREPROCESS_MODES
from tokenflow_sdk.understanding.params import AnswerParams

__all__ = ["make_parser"]

_Subparsers: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

_DESCRIPTION = """\
Pictures to codes and back with TokenFlow tokenizers.

  tokenflow encode photo.jpg                                     photo.tfc, about 1 KB
  tokenflow decode photo.tfc                                     photo.png
  tokenflow reconstruct photo.jpg                                what each scale adds, side by side
  tokenflow generate "a red apple"                               1.png
  tokenflow ask photo.jpg "What is this?" --bundle bundles/chat  the answer
  tokenflow encode photo.jpg --bundle bundles/clipb_256          with another model than the small bundled one
  tokenflow info photo.tfc                                       what a file or a bundle holds

A bundle is a directory made by `tokenflow export`, a Hugging Face id (org/name), or `tiny`, which comes with the SDK
and is used where none is named.
"""

_ASKING = """\
Answer a question about one or several pictures, or their codes. The answer is printed as it is found.

  tokenflow ask photo.jpg "What is on the table?" --bundle bundles/chat
  tokenflow ask photo.tfc "And the colour?" --bundle bundles/chat         no encoder runs
  tokenflow ask one.jpg two.jpg "What is different?" --bundle bundles/chat --temperature 0.7 --seed 1

No model for this comes with the SDK. One is exported where PyTorch is, from a released directory:

  tokenflow export understanding --checkpoint DIR --tokenizer bundles/siglip_384 --out bundles/chat --weights int8
"""

_BUILDING = """\
TensorRT engines for a bundle, into the engine cache.

  tokenflow build bundles/clipb_256 --config rtx4090             ahead of time, no GPU needed
  tokenflow build bundles/clipb_256 --target sm86,sm89,sm120     for a fleet, with TensorRT-RTX
  tokenflow build bundles/clipb_256 --backend tensorrt           for the GPU that is here
  tokenflow build bundles/clipb_256 --decoder int8               decoding in 8 bits, after `tokenflow export calibrate`

An engine is used only by the version it was built with, on its architecture, for the very graph it was built from;
anything else is built again.
"""


def make_parser() -> argparse.ArgumentParser:
    """The parser; each command's namespace carries its function as `run`."""
    parser = argparse.ArgumentParser(
        "tokenflow", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"tokenflow-sdk {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    # Its own parser reads what follows; see `tokenflow_sdk.cli.main`.
    subparsers.add_parser("export", add_help=False, help="a released PyTorch checkpoint to a bundle; needs the extra `export`")
    for add in (_add_info, _add_tokenizing, _add_generating, _add_asking, _add_measuring, _add_building):
        add(subparsers)
    return parser


def _add_info(subparsers: _Subparsers) -> None:
    about = _command(subparsers, "info", info.info, "what a bundle or a .tfc file holds")
    about.add_argument("target", nargs="?", metavar="BUNDLE|FILE.tfc", help="a bundle, or a file of codes")
    about.add_argument("--bundle", metavar="PATH|NAME", help="the same as giving a bundle first")


def _add_tokenizing(subparsers: _Subparsers) -> None:
    encode = _command(subparsers, "encode", commands.encode, "pictures to .tfc files of codes")
    encode.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="pictures, or directories of pictures")
    _output(encode, ".tfc file for one picture, else a directory (default: the current one)")
    _engine(encode)
    _picture(encode)

    decode = _command(subparsers, "decode", commands.decode, ".tfc files to PNG pictures")
    decode.add_argument("files", nargs="+", type=Path, metavar="FILE.tfc", help="files of codes")
    _output(decode, "picture file for one file of codes, else a directory (default: the current one)")
    decode.add_argument("--scales", type=int, metavar="N", help="decode the N coarsest scales only")
    _engine(decode)

    reconstruct = _command(
        subparsers, "reconstruct", commands.reconstruct, "original, every scale's preview and the result in one picture"
    )
    reconstruct.add_argument("image", type=Path, metavar="IMAGE")
    _output(reconstruct, "the picture to write (default: side_by_side.png)")
    _engine(reconstruct)
    _picture(reconstruct)


def _add_generating(subparsers: _Subparsers) -> None:
    drawing = _command(subparsers, "generate", generate.generate, "pictures from text")
    drawing.add_argument("prompt", nargs="?", metavar="PROMPT", help="what to draw, in quotes")
    drawing.add_argument("--replay", type=Path, metavar="FILE.png", help="draw again what this picture's metadata says")
    drawing.add_argument("-n", type=int, default=1, metavar="N", help="pictures (default: %(default)s)")
    _output(drawing, "directory for 1.png, 2.png ... (default: the current one)")
    drawing.add_argument("--preset", help="fast (1 pass), balanced (2) or paper (3); default: the model's own")
    drawing.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same seed draws the same picture (default: %(default)s)"
    )
    drawing.add_argument("--cfg-scale", type=float, metavar="X", help="strength of guidance (default: the model's own)")
    drawing.add_argument("--negative-prompt", metavar="TEXT", help="what to lead away from (default: the model's own)")
    drawing.add_argument("--progressive", action="store_true", help="also write scales.png, the picture after every scale")
    _tokenizer(drawing)
    _engine(drawing, what="the generator")


def _add_asking(subparsers: _Subparsers) -> None:
    asking = _command(subparsers, "ask", ask.ask, "a question about pictures")
    asking.description = _ASKING
    asking.formatter_class = argparse.RawDescriptionHelpFormatter
    asking.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="pictures, or .tfc files of their codes")
    asking.add_argument("question", metavar="QUESTION", help="in quotes")
    defaults = AnswerParams()
    for name, kind, text in (
        ("max_tokens", int, "most tokens of the answer"),
        ("temperature", float, "0 always takes the likeliest token"),
        ("top_p", float, "draw from the likeliest tokens that hold this share of the probability"),
        ("top_k", int, "draw from so many of the likeliest tokens"),
        ("repetition_penalty", float, "above 1: repeat less"),
        ("seed", int, "the same seed draws the same answer"),
    ):
        option, value = f"--{name.replace('_', '-')}", getattr(defaults, name)
        asking.add_argument(option, type=kind, default=value, metavar="N", help=f"{text} (default: %(default)s)")
    _tokenizer(asking)
    _engine(asking, what="the understander", default="there is none")


def _add_measuring(subparsers: _Subparsers) -> None:
    checking = _command(subparsers, "verify", verify.verify, "check a bundle's files, and its numbers against PyTorch's")
    checking.add_argument("target", nargs="?", metavar="BUNDLE")
    _engine(checking)

    timing = _command(
        subparsers,
        "bench",
        bench.bench,
        "time a bundle on this machine: a tokenizer's graphs, a generator's presets, or answers",
    )
    timing.add_argument("target", nargs="?", metavar="BUNDLE")
    timing.add_argument("--batch", default="1", metavar="N,N..", help="batch sizes (default: %(default)s)")
    timing.add_argument("--repeat", type=int, default=5, metavar="N", help="timed calls each (default: %(default)s)")
    timing.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    _tokenizer(timing)
    _engine(timing)


def _add_building(subparsers: _Subparsers) -> None:
    building = _command(subparsers, "build", build.build, "TensorRT engines for a bundle, into the engine cache")
    building.description = _BUILDING
    building.formatter_class = argparse.RawDescriptionHelpFormatter
    building.add_argument("bundle", nargs="?", metavar="BUNDLE", help="default: tiny")
    building.add_argument("--config", metavar="NAME|FILE", help=f"settings for a device: {', '.join(build_config_names())}")
    building.add_argument("--backend", choices=sorted(FLAVOURS), help="default: tensorrt-rtx")
    building.add_argument(
        "--precision",
        choices=("fp32", "fp16", "bf16"),
        help="default: fp16; bf16 is as large and less exact, for generators with numbers beyond float16's 65,504",
    )
    building.add_argument(
        "--decoder",
        choices=get_args(EightBit),
        help="a tokenizer's decoder in 8 bits, fp8 from sm89 on; run `tokenflow export calibrate` first (default: --precision)",
    )
    building.add_argument(
        "--batch", metavar="N,N,N", help="least, usual and most pictures or answers in a call (default: 1,1,8)"
    )
    building.add_argument(
        "--target", dest="architectures", metavar="SM,SM", help="architectures to build for, e.g. sm86,sm89 (tensorrt-rtx only)"
    )
    building.add_argument(
        "--pages", type=int, metavar="N", help="pages of a language model's pool (default: eight pictures or questions)"
    )
    building.add_argument("--workspace-gb", type=float, metavar="X", help="scratch memory an engine may use")
    _cache(building)

    stored = _command(subparsers, "cache", build.cache, "list or clear the built engines")
    stored.add_argument("action", choices=("list", "clear"))
    _cache(stored)


def _command(
    subparsers: _Subparsers,
    name: str,
    run: Callable[[argparse.Namespace], int],
    summary: str,
) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def _output(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("-o", "--output", type=Path, metavar="PATH", help=text)


def _cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache", type=Path, metavar="DIR", help="where engines are (default: $TOKENFLOW_CACHE, else the user's cache)"
    )


def _tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer", metavar="PATH|NAME", help="the model's tokenizer bundle (default: where it was at export)"
    )


def _engine(parser: argparse.ArgumentParser, what: str = "the tokenizer", default: str = "tiny") -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--bundle", metavar="PATH|NAME", help=f"{what}: a directory or a hub id (default: {default})")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    text = "auto takes the fastest that works and needs no building (default)"
    group.add_argument("--backend", choices=BACKENDS, default="auto", help=text)
    group.add_argument("--config", metavar="NAME|FILE", help="how TensorRT engines are built, as for `tokenflow build`")
    group.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all cores)")
    group.add_argument(
        "--batch-limit", type=int, default=1, metavar="N", help="most pictures in one call (default: %(default)s)"
    )


def _picture(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--preprocess",
        choices=PREPROCESS_MODES,
        help="crop the centre, squash the whole or pad it with white (default: as the tokenizer was released)",
    )
    group.add_argument("--fast", action="store_true", help="decode large JPEGs at reduced size; codes may differ slightly")
