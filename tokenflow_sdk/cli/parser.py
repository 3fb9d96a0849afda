"""The argument parser of the `tokenflow` command, with the help texts of all subcommands."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias, get_args

from tokenflow_sdk import __version__
from tokenflow_sdk.backends.openvino import OPENVINO
from tokenflow_sdk.backends.tensorrt_module import FLAVOURS
from tokenflow_sdk.cli import ask, bench, build, decode, encode, generate, info, reconstruct, tokenize, verify
from tokenflow_sdk.cli.help import Parser, add_command
from tokenflow_sdk.cli.outputs import STDIO, Output
from tokenflow_sdk.dataset.job_options import EXTRAS, JobOptions
from tokenflow_sdk.dataset.outputs import FORMATS
from tokenflow_sdk.engines.build_config import Precision, build_config_names
from tokenflow_sdk.engines.options import BACKENDS
from tokenflow_sdk.passes.quantize import DecoderType
from tokenflow_sdk.pictures.decode import MAX_PIXELS
from tokenflow_sdk.pictures.preparation import COLORS, PREPROCESS_MODES
from tokenflow_sdk.understanding.params import DEFAULT_MAX_TOKENS, AnswerParams

__all__ = ["make_parser"]

_Subparsers: TypeAlias = "argparse._SubParsersAction[Parser]"

_DESCRIPTION = """\
Images to codes and back with TokenFlow tokenizers, images from text, and
answers about images.

  tokenflow encode photo.jpg           writes photo.tfc, about 1 KB
  tokenflow decode photo.tfc           writes photo.png
  tokenflow reconstruct photo.jpg      writes side_by_side.png, scale by scale
  tokenflow generate "a red apple"     writes 1.png
  tokenflow ask photo.jpg "What is this?"
                                       prints the answer
  tokenflow encode photos -o codes --bundle bundles/clipb_256
                                       another model than the one in the SDK
  tokenflow tokenize photos -o codes   a data set; goes on where it was ended
  tokenflow info photo.tfc             what a file of codes or a bundle holds
  tokenflow info                       what is installed and works here

A bundle is a directory made by `tokenflow export`, a Hugging Face id
(org/name), or `tiny`, the default, which comes with the SDK.
"""

_ASKING = """\
Answer a question about images, or about their codes. The answer is printed as
it is generated.

  tokenflow ask photo.jpg "What is this?"
  tokenflow ask photo.tfc "Which colours does it have?"
  tokenflow ask one.jpg two.jpg "What is different?" --bundle bundles/chat \\
      --temperature 0.7 --seed 1

`tiny` knows a few kinds of questions; `tokenflow info tiny` says which. For
others export a released checkpoint, on a machine with PyTorch:

  tokenflow export understanding --checkpoint DIR --weights int8 \\
      --tokenizer bundles/siglip_384 --out bundles/chat
"""

_BUILDING = """\
Build a bundle's engines into the engine cache.

  tokenflow build bundles/clipb_256 --config rtx4090
      for an RTX 4090, on a machine without a GPU
  tokenflow build bundles/clipb_256 --target sm86,sm89,sm120
      for several GPU architectures, with TensorRT-RTX
  tokenflow build bundles/clipb_256 --backend tensorrt
      for the GPU in this machine
  tokenflow build bundles/clipb_256 --config cpu-bf16-decoder
      for a CPU with AVX-512 BF16 or AMX, with OpenVINO
  tokenflow build bundles/clipb_256 --decoder int8
      decoder in 8 bits; run `tokenflow export calibrate` first
  tokenflow build bundles/t2i --config l4 --plan
      the memory that the engines will take; builds nothing
  tokenflow build bundles/clipb_256 --triton models
      no engines: a model repository of Triton, whose onnxruntime runs it

An engine is used only with the TensorRT version and GPU architecture it was
built for, and for an unchanged graph; otherwise it is built again.
"""

_TOKENIZING = """\
Encode a data set of pictures, from one directory to a bucket of millions.

  tokenflow tokenize photos -o codes
      a directory and what is below it, to Parquet files
  tokenflow tokenize 's3://bucket/{00000..01023}.tar' -o s3://bucket/codes
      tars as WebDataset writes them; anything that fsspec opens
  tokenflow tokenize pictures.parquet --key-column id -o codes --also semantic
      pictures in Parquet files, and features beside the codes
  tokenflow tokenize photos -o codes --shard 3/16
      the third of sixteen processes that share the job
  tokenflow tokenize --verify codes
      whether all is there, and as the bundle gives it

Each part of the input becomes one output file, which appears whole. Whatever
ends the command, the same command goes on. A picture that cannot be read is a
row with its error.
"""

_LIMIT = "most images in one call (default: 1 on a CPU, 8 with CUDA, as engines were built with TensorRT)"
_PAGES = "pages of a language model's key/value pool (default: enough for eight images or questions)"
_INSTEAD = "the bundle, instead of the first argument"
_OVER_IMAGES = "replace files that do not say that tokenflow wrote them, but never an input"
_SHARED = "CPU threads of a call; as many calls run at once as fill the cores (default: 1, above 15 cores an eighth of them)"
_SEVERAL = "{}, directories of them and what is below, or patterns like 'in/**/*'; -: stdin"


def make_parser() -> argparse.ArgumentParser:
    """Make the parser. Parsed arguments have the attribute `run`: a function that takes them and returns the exit status."""
    parser = Parser("tokenflow", description=_DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"tokenflow-sdk {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    # Listed here for the help only: `tokenflow_sdk.cli.main` hands `export` and `serve` to parsers of their own.
    subparsers.add_parser(
        "export", add_help=False, help="convert a released PyTorch checkpoint to a bundle; needs the extra `export`"
    )
    subparsers.add_parser("serve", add_help=False, help="answer over HTTP, with a page to try it; needs the extra `serve`")
    _add_info(subparsers)
    _add_encode(subparsers)
    _add_tokenize(subparsers)
    _add_decode(subparsers)
    _add_reconstruct(subparsers)
    _add_generate(subparsers)
    _add_ask(subparsers)
    _add_verify(subparsers)
    _add_bench(subparsers)
    _add_build(subparsers)
    _add_cache(subparsers)
    return parser


def _add_info(subparsers: _Subparsers) -> None:
    summary = "print what a bundle or a .tfc file holds; without one, what is installed and which backends work"
    parser = _add_command(subparsers, "info", info.info, summary)
    parser.add_argument(
        "target", nargs="?", metavar="BUNDLE|FILE.tfc", help="a bundle, a file of codes, or a PNG of `tokenflow generate`"
    )
    parser.add_argument("--bundle", metavar="PATH|NAME", help=f"{_INSTEAD}: a directory or a Hugging Face id")
    parser.add_argument("--graphs", action="store_true", help="also print the graphs' inputs and outputs, and all provenance")
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    _add_pins(parser)


def _add_encode(subparsers: _Subparsers) -> None:
    parser = _add_command(subparsers, "encode", encode.encode, "encode images to .tfc files of codes")
    parser.add_argument("images", nargs="+", type=_path, metavar="IMAGE", help=_SEVERAL.format("image files"))
    _add_output(
        parser,
        "FILE.tfc or - (stdout) for a single image; any other name is a directory (default: the current one; stdout for -). "
        "In it the codes of b.jpg are b.tfc, and those of a.jpg and a.png, if both are given, a.jpg.tfc and a.png.tfc",
        "replace files that are no codes, but never an input; encode images again whose codes are there",
    )
    _add_engine_options(parser)
    _add_image_options(parser)


def _add_tokenize(subparsers: _Subparsers) -> None:
    summary = "encode a data set of pictures to Parquet files or tars; goes on where it was ended"
    parser = _add_command(subparsers, "tokenize", tokenize.tokenize, summary)
    parser.description = _TOKENIZING
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="INPUT",
        help="directories, patterns like 'in/**/*', tars or Parquet files, local or s3://... and the like; {00..99} counts",
    )
    parser.add_argument("-o", "--output", metavar="DIR", help="directory or address of the output; a job in it goes on")
    parser.add_argument("--format", choices=FORMATS, default="parquet", help="of the output (default: %(default)s)")
    parser.add_argument("--also", metavar="NAME,NAME", help=f"store beside codes, in float16: {', '.join(EXTRAS)}")
    parser.add_argument("--scales", type=int, metavar="N", help="store only the N coarsest scales (default: all)")
    defaults = JobOptions()
    parser.add_argument(
        "--shard-size",
        type=int,
        default=defaults.shard_size,
        metavar="N",
        help="pictures of a directory in one output file (default: %(default)s); tars and Parquet files have one each",
    )
    parser.add_argument(
        "--image-column",
        default=defaults.image_column,
        metavar="NAME",
        help="of Parquet files: bytes or paths of pictures (default: %(default)s)",
    )
    parser.add_argument("--key-column", metavar="NAME", help="of Parquet files: names of pictures (default: numbers of rows)")
    parser.add_argument("--retry-errors", action="store_true", help="also encode pictures again that had an error")
    parser.add_argument("--shard", metavar="I/N", help="be the I-th of N processes that share the job, each with its own parts")
    parser.add_argument("--ray", metavar="ADDRESS", help="run on a Ray cluster: its address, or auto for the one that is here")
    parser.add_argument("--devices", metavar="NAMES", help="several GPUs, each with a tokenizer: cuda:0,cuda:1 or all")
    parser.add_argument("--json", action="store_true", help="print the progress and the end as lines of JSON")
    parser.add_argument("--verify", metavar="OUT", help="check the output of a job instead of running one")
    _add_engine_options(parser, threads=_SHARED)
    _add_image_options(parser)


def _add_decode(subparsers: _Subparsers) -> None:
    parser = _add_command(subparsers, "decode", decode.decode, "decode .tfc files to PNG images")
    parser.add_argument("files", nargs="+", type=_path, metavar="FILE.tfc", help=_SEVERAL.format("files of codes"))
    _add_output(
        parser,
        "FILE.png, .jpg, .webp ... or - (stdout, PNG) for a single file of codes; any other name is a directory "
        "(default: the current one; stdout for -)",
        f"{_OVER_IMAGES}; decode codes again whose PNGs are there",
    )
    parser.add_argument("--scales", type=int, metavar="N", help="decode only the N coarsest scales (default: all)")
    _add_engine_options(parser)


def _add_reconstruct(subparsers: _Subparsers) -> None:
    summary = "write an image, its reconstruction from every number of scales, and their sizes and PSNR into one image"
    parser = _add_command(subparsers, "reconstruct", reconstruct.reconstruct, summary)
    parser.add_argument("image", type=_path, metavar="IMAGE", help="an image file")
    _add_output(
        parser,
        "FILE.png, .jpg, .webp ... or - (stdout, PNG); any other name is a directory for side_by_side.png "
        "(default: the current one)",
    )
    _add_engine_options(parser)
    _add_image_options(parser)


def _add_generate(subparsers: _Subparsers) -> None:
    parser = _add_command(subparsers, "generate", generate.generate, "draw images from text")
    parser.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="what to draw, in quotes; `tokenflow info tiny` lists what `tiny` can draw"
    )
    parser.add_argument(
        "--replay",
        type=_path,
        metavar="FILE.png",
        help="draw again with the prompt and settings in this image's metadata; takes no PROMPT, -n or sampling option",
    )
    parser.add_argument("-n", type=int, metavar="N", help="number of images (default: 1)")
    _add_output(parser, "directory for 1.png, 2.png ... (default: the current one)")
    parser.add_argument(
        "--preset",
        help="sampling passes for each scale: fast (1), balanced (2) or paper (3); turbo: fast, without guidance at the two "
        "finest scales (default: the model's)",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="the same seed draws the same images (default: a random one, which is printed)"
    )
    parser.add_argument(
        "--cfg-scale", type=float, metavar="X", help="strength of classifier-free guidance; 0: none (default: the model's)"
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what the images should not show (default: the model's)")
    parser.add_argument("--progressive", action="store_true", help="also write scales.png: each image after every scale")
    _add_tokenizer_option(parser)
    _add_engine_options(parser, what="the generator", paged=True)


def _add_ask(subparsers: _Subparsers) -> None:
    parser = _add_command(subparsers, "ask", ask.ask, "answer a question about images")
    parser.description = _ASKING
    parser.add_argument("images", nargs="+", type=_path, metavar="IMAGE", help="image files, or .tfc files of their codes")
    parser.add_argument("question", metavar="QUESTION", help="in quotes")
    defaults = AnswerParams()
    for name, kind, text in (
        ("max_tokens", int, "most tokens of the answer"),
        ("temperature", float, "temperature of sampling; 0 always takes the likeliest token"),
        ("top_p", float, "sample from the likeliest tokens that together have this probability"),
        ("top_k", int, "sample from this many of the likeliest tokens"),
        ("repetition_penalty", float, "above 1: repeat less"),
    ):
        option, value = f"--{name.replace('_', '-')}", getattr(defaults, name)
        shown = f"{DEFAULT_MAX_TOKENS}, or as many as the model still reads" if value is None else value
        parser.add_argument(option, type=kind, default=value, metavar="N", help=f"{text} (default: {shown})")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed samples the same answer (default: a random one)")
    _add_tokenizer_option(parser)
    _add_engine_options(parser, what="the understander", paged=True)
    _add_image_options(parser)


def _add_verify(subparsers: _Subparsers) -> None:
    summary = "check a bundle's files against their hashes, and its results on this machine against its reference"
    parser = _add_command(subparsers, "verify", verify.verify, summary)
    parser.add_argument("target", nargs="?", metavar="BUNDLE", help="default: tiny")
    _add_engine_options(parser, what=_INSTEAD)


def _add_bench(subparsers: _Subparsers) -> None:
    summary = "time a bundle on this machine: a tokenizer's graphs, a generator's presets, or an understander's answers"
    parser = _add_command(subparsers, "bench", bench.bench, summary)
    parser.add_argument("target", nargs="?", metavar="BUNDLE", help="default: tiny")
    parser.add_argument(
        "--batch-sizes", default="1", metavar="N,N..", help="numbers of images in a call to time (default: %(default)s)"
    )
    parser.add_argument(
        "--choose",
        action="store_true",
        help="measure which graphs of a tokenizer are faster on OpenVINO than on onnxruntime on this CPU, and store it for "
        "--backend auto, here and in Python",
    )
    parser.add_argument("--repeat", type=int, default=5, metavar="N", help="timed calls of each kind (default: %(default)s)")
    parser.add_argument("--json", type=_path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--pages", type=int, metavar="N", help=_PAGES)
    _add_tokenizer_option(parser)
    _add_engine_options(parser, what=_INSTEAD)


def _add_build(subparsers: _Subparsers) -> None:
    parser = _add_command(
        subparsers, "build", build.build, "build a bundle's engines, for TensorRT or OpenVINO, into the engine cache"
    )
    parser.description = _BUILDING
    parser.add_argument("bundle", nargs="?", metavar="BUNDLE", help="default: tiny")
    _add_pins(parser)
    parser.add_argument(
        "--config",
        metavar="NAME|FILE",
        help=f"build config, a TOML file or one of {', '.join(build_config_names())}; the options below override it",
    )
    parser.add_argument("--backend", choices=sorted((OPENVINO, *FLAVOURS)), help="default: tensorrt-rtx")
    parser.add_argument(
        "--precision",
        choices=get_args(Precision),
        help="default: fp16; bf16 is less exact, for generators with numbers beyond float16's largest, 65,504; for OpenVINO "
        "give fp32 or bf16",
    )
    parser.add_argument(
        "--decoder",
        choices=get_args(DecoderType),
        help="type of a tokenizer's decoder alone: int8, or fp8 from sm89 on, after `tokenflow export calibrate`; bf16 for "
        "OpenVINO beside --precision fp32 (default: as --precision)",
    )
    parser.add_argument("--batch-limit", type=int, metavar="N", help="most images or answers in one call (default: 8)")
    parser.add_argument(
        "--batch-usual", type=int, metavar="N", help="images or answers in a call that engines are tuned for (default: 1)"
    )
    parser.add_argument(
        "--target",
        dest="architectures",
        metavar="SM,SM",
        help="GPU architectures to build for, e.g. sm86,sm89; tensorrt-rtx only (default: the GPU in this machine)",
    )
    parser.add_argument("--pages", type=int, metavar="N", help=_PAGES)
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads that OpenVINO compiles for (default: all cores)")
    parser.add_argument(
        "--workspace-gb", type=float, metavar="X", help="scratch memory an engine may use, in GiB (default: no limit)"
    )
    parser.add_argument(
        "--memory-gb",
        type=float,
        metavar="X",
        help="memory of the GPU in GB (10^9 bytes); engines that need more are not built (default: that of the GPU here)",
    )
    results = parser.add_mutually_exclusive_group()
    results.add_argument("--plan", action="store_true", help="print the GPU memory that the engines take, and build nothing")
    results.add_argument(
        "--triton",
        type=_path,
        metavar="DIR",
        help="write a tokenizer's graphs as a model repository of NVIDIA's Triton: with --backend tensorrt the engines, "
        "without --backend and --config the ONNX files",
    )
    parser.add_argument("--force", action="store_true", help="replace a repository that --triton wrote")
    _add_cache_option(parser)


def _add_cache(subparsers: _Subparsers) -> None:
    parser = _add_command(subparsers, "cache", build.cache, "list or remove the engines in the engine cache")
    what = "list prints the engines, their sizes and how their comparisons ended; clear removes them all"
    parser.add_argument("action", choices=("list", "clear"), metavar="list|clear", help=what)
    _add_cache_option(parser)


def _add_command(
    subparsers: _Subparsers, name: str, run: Callable[[argparse.Namespace], int], summary: str
) -> argparse.ArgumentParser:
    parser = add_command(subparsers, name, summary)
    parser.set_defaults(run=run)
    return parser


def _path(text: str) -> Path:
    """A path. `./-` stays a file, unlike `-`, which is stdin or stdout."""
    if not text:
        raise argparse.ArgumentTypeError("a file has an empty name")
    path = Path(text)
    return path.absolute() if path == STDIO and text != str(path) else path


def _output(text: str) -> Output:
    return Output.of(_path(text), text)


def _add_output(parser: argparse.ArgumentParser, text: str, forced: str = _OVER_IMAGES) -> None:
    parser.add_argument("-o", "--output", type=_output, metavar="PATH", help=text)
    parser.add_argument("--force", action="store_true", help=forced)


def _add_cache_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache",
        type=_path,
        metavar="DIR",
        help="directory of engines (default: $TOKENFLOW_CACHE, else tokenflow/engines in the user's cache directory)",
    )


def _add_tokenizer_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer",
        metavar="PATH|NAME",
        help="bundle of a language model's paired tokenizer (default: the path it had at export, relative to the model)",
    )


def _add_engine_options(
    parser: argparse.ArgumentParser,
    what: str = "the tokenizer",
    paged: bool = False,
    threads: str = "CPU threads (default: all cores)",
) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--bundle", metavar="PATH|NAME", help=f"{what}: a directory or a Hugging Face id (default: tiny)")
    _add_pins(group)
    group.add_argument(
        "--device",
        default="auto",
        help="auto, cpu, cuda or cuda:N; with OpenVINO also gpu, gpu:N or npu (default: %(default)s)",
    )
    group.add_argument(
        "--backend",
        choices=BACKENDS,
        default="auto",
        metavar="NAME",
        help=f"one of {', '.join(BACKENDS)}; auto takes the first that works without building engines: TensorRT, "
        "onnxruntime with CUDA, OpenVINO where `tokenflow bench --choose` found it faster, onnxruntime (default: %(default)s)",
    )
    group.add_argument("--config", metavar="NAME|FILE", help="build config, as for `tokenflow build`")
    group.add_argument("--threads", type=int, metavar="N", help=threads)
    if paged:
        group.add_argument("--pages", type=int, metavar="N", help=_PAGES)
    else:
        group.add_argument("--batch-limit", type=int, metavar="N", help=_LIMIT)


def _add_pins(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a Hugging Face id (default: the newest)")
    parser.add_argument(
        "--sha256",
        metavar="HEX",
        help="refuse a bundle whose bundle.json has another SHA-256; `tokenflow info` prints it (default: any)",
    )


def _add_image_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("images")
    group.add_argument(
        "--preprocess",
        choices=PREPROCESS_MODES,
        help="how images are made square: crop the centre, squash, pad with white, or pad with grey (default: the bundle's)",
    )
    group.add_argument(
        "--color",
        choices=COLORS,
        default="srgb",
        help="srgb converts images with a colour profile to sRGB, as-stored reads past profiles (default: %(default)s)",
    )
    group.add_argument("--fast", action="store_true", help="decode large JPEGs at reduced size; codes may differ slightly")
    group.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        metavar="N",
        help="pixels of the largest image accepted; raise it for images from a source you trust (default: %(default)s)",
    )
