"""`tokenflow export`: from released checkpoints to bundles."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from rich.console import Console

from tokenflow_export.models.config import VARIANTS
from tokenflow_sdk.errors import ArgumentError, MissingPackageError, OutputError, TokenFlowError
from tokenflow_sdk.pictures.images import pictures_in

if TYPE_CHECKING:
    from tokenflow_export.language_model.agreement import Agreement
    from tokenflow_export.progress import ProgressSteps

_EXTRA = ("torch", "onnx", "onnx_ir", "onnxscript", "onnxruntime", "safetensors", "tokenizers", "huggingface_hub")

_DESCRIPTION = """\
Turn a released PyTorch checkpoint into a bundle: ONNX graphs and a bundle.json that tokenflow_sdk runs without torch.

    tokenflow export tokenizer --checkpoint tokenflow_clipb_32k_enhanced.pt --out bundles/clipb_256
    tokenflow export generator --checkpoint TokenFlow-t2i/ --tokenizer bundles/clipb_256 --out bundles/t2i
    tokenflow export understanding --checkpoint TokenFlow-llava/ --tokenizer bundles/siglip_384 --out bundles/chat
    tokenflow export precision-search bundles/clipb_256 --images photos/
    tokenflow export calibrate bundles/clipb_256 --images photos/
    tokenflow export inspect bundles/clipb_256 decode
    tokenflow export standin --variant clipb_256 --out checkpoints/clipb_256.pt
"""


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0 done, 2 the user can mend it, 130 interrupted."""
    arguments = _parser().parse_args(argv)
    console = Console(stderr=True, highlight=False)
    try:
        with _naming_missing_packages():
            arguments.run(arguments)
    except TokenFlowError as error:
        console.print(f"error: {error}", style="red", soft_wrap=True, markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("interrupted; nothing was written", style="yellow")
        return 130
    return 0


@contextmanager
def _naming_missing_packages() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        package = (error.name or "").split(".")[0]
        if package not in _EXTRA:
            raise
        raise MissingPackageError(f"{package} is not installed.", "Run `pip install 'tokenflow-sdk[cpu,export]'`.") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "tokenflow export", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    tokenizer = commands.add_parser("tokenizer", help="a tokenizer checkpoint to a bundle")
    tokenizer.add_argument("--checkpoint", required=True, help=".pt or .safetensors file, or hf://org/repo/file")
    tokenizer.add_argument(
        "--variant", choices=list(VARIANTS), help="settles whether a CLIP tokenizer runs at 224 or 256 px; else recognised"
    )
    tokenizer.add_argument("--out", required=True, type=Path, help="the bundle's directory; must not exist yet")
    tokenizer.add_argument("--force", action="store_true", help="replace --out if it exists")
    tokenizer.set_defaults(run=_run_tokenizer)
    generator = commands.add_parser("generator", help="a text-to-image directory to a bundle")
    _language_model(generator, "the bundle of the tokenizer that decodes its codes")
    generator.set_defaults(run=_run_generator)
    understanding = commands.add_parser("understanding", help="a LLaVA directory (Qwen2 or Llama layout) to a bundle")
    _language_model(understanding, "the bundle of the tokenizer whose codes it reads")
    understanding.set_defaults(run=_run_understanding)
    searching = commands.add_parser(
        "precision-search", help="what half precision costs, and which nodes must stay in float32 for engines in it"
    )
    searching.add_argument(
        "bundle", type=Path, metavar="BUNDLE", help="a tokenizer's or a generator's; findings are stored in it"
    )
    searching.add_argument(
        "--precision", choices=("fp16", "bf16"), default="fp16", help="of the engines (default: %(default)s)"
    )
    searching.add_argument("--images", type=Path, metavar="DIR", help="photos to measure a tokenizer on")
    searching.add_argument("--crops", type=int, default=24, metavar="N", help="crops of them (default: %(default)s)")
    searching.add_argument(
        "--decoded", type=int, metavar="N", help="how many of them are decoded too, which takes the longest (default: all)"
    )
    searching.add_argument(
        "--bar", type=float, default=0.975, help="least teacher-forced code agreement in any scale (default: %(default)s)"
    )
    searching.set_defaults(run=_run_precision_search)
    calibrating = commands.add_parser(
        "calibrate", help="what engines with a decoder in int8 or fp8 need to know, and what 8 bits cost"
    )
    calibrating.add_argument("bundle", type=Path, metavar="BUNDLE", help="a tokenizer's; what is found is stored in it")
    calibrating.add_argument("--images", required=True, type=Path, metavar="DIR", help="photos to take ranges from")
    calibrating.add_argument(
        "--held-out",
        type=Path,
        metavar="DIR",
        help="photos to measure on (default: every fourth of --images, kept out of the ranges)",
    )
    calibrating.add_argument("--crops", type=int, default=64, metavar="N", help="crops of each (default: %(default)s)")
    calibrating.set_defaults(run=_run_calibrate)
    inspecting = commands.add_parser(
        "inspect", help="where a graph in half precision, or in TensorRT, drifts from float32 in onnxruntime, by tensor"
    )
    inspecting.add_argument("bundle", type=Path, metavar="BUNDLE", help="a tokenizer's")
    inspecting.add_argument("graph", choices=("encode", "decode", "semantic", "features"))
    inspecting.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp16", help="default: %(default)s")
    inspecting.add_argument(
        "--backend", choices=("onnxruntime", "tensorrt", "tensorrt-rtx"), default="onnxruntime", help="default: %(default)s"
    )
    inspecting.add_argument("--top", type=int, default=20, metavar="N", help="tensors to show (default: %(default)s)")
    inspecting.set_defaults(run=_run_inspect)
    standin = commands.add_parser(
        "standin", help="a full-size checkpoint of stand-in weights, to try everything without a download"
    )
    standin.add_argument("--variant", choices=list(VARIANTS), default="clipb_256", help="default: %(default)s")
    standin.add_argument("--out", required=True, type=Path, help="the .pt file; must not exist yet")
    standin.set_defaults(run=_run_standin)
    return parser


def _language_model(parser: argparse.ArgumentParser, tokenizer: str) -> None:
    parser.add_argument("--checkpoint", required=True, type=Path, help="the released Hugging Face directory")
    parser.add_argument("--tokenizer", required=True, type=Path, help=tokenizer)
    parser.add_argument("--out", required=True, type=Path, help="the bundle's directory; must not exist yet")
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16"), default="fp32", help="of the arithmetic; fp16 is for GPUs (default: %(default)s)"
    )
    weights = "the transformer's in fewer bits; int8 is the fast one on CPUs"
    parser.add_argument("--weights", choices=("int8", "int4"), help=weights)
    parser.add_argument("--force", action="store_true", help="replace --out if it exists")


def _run_tokenizer(arguments: argparse.Namespace) -> None:
    from tokenflow_export.checkpoints.tokenizer import load_model, read_state_dict, recognise, resolve
    from tokenflow_export.progress import ProgressSteps
    from tokenflow_export.tokenizer.export import export_tokenizer
    from tokenflow_sdk.bundle.bundle import file_sha256

    began = perf_counter()
    with ProgressSteps() as steps:
        steps.start("reading the checkpoint")
        path = resolve(arguments.checkpoint)
        state = read_state_dict(path)
        config = recognise({key: tuple(value.shape) for key, value in state.items()}, arguments.variant, path.name)
        model = load_model(state, config, path.name)
        del state
        source = {"checkpoint": path.name, "checkpoint_sha256": file_sha256(path)}
        report = export_tokenizer(model, arguments.out, source, steps, arguments.force)
    agreement = " ".join(f"{side}:{share:.2%}" for side, share in zip(report.patch_nums, report.agreement, strict=True))
    print(f"{config.variant} -> {arguments.out} in {perf_counter() - began:.0f} s, checked on {report.pictures} pictures:")
    print(f"  teacher-forced code agreement by scale  {agreement}")
    print(f"  flips {len(report.flips)}, equal codes {report.equal_codes:.2%}, decode PSNR {report.decode_psnr:.1f} dB")
    print(f"  largest error: features {report.features_error:.1e}, semantic features {report.semantic_error:.1e}")


def _run_generator(arguments: argparse.Namespace) -> None:
    from tokenflow_export.language_model.generator import export_generator

    _run_language_model(arguments, export_generator, "code")


def _run_understanding(arguments: argparse.Namespace) -> None:
    from tokenflow_export.language_model.understanding import export_understanding

    _run_language_model(arguments, export_understanding, "token")


def _run_language_model(arguments: argparse.Namespace, export: Callable[..., Agreement], choice: str) -> None:
    from tokenflow_export.checkpoints.hf_directory import HfDirectory
    from tokenflow_export.progress import ProgressSteps
    from tokenflow_export.tracing.weight_quantization import ExportPrecision
    from tokenflow_sdk.bundle.bundle import Bundle
    from tokenflow_sdk.bundle.model_config import TokenizerConfig

    began = perf_counter()
    tokenizer = Bundle.open(arguments.tokenizer, TokenizerConfig)
    precision = ExportPrecision(arguments.dtype, arguments.weights)
    with ProgressSteps() as steps:
        found = export(HfDirectory(arguments.checkpoint), tokenizer, arguments.out, steps, arguments.force, precision)
    print(f"{arguments.checkpoint} -> {arguments.out} in {perf_counter() - began:.0f} s, {precision.name}")
    print(f"  hidden states differ from float32 PyTorch by {found.hidden_error:.1e}, cosine {found.hidden_cosine:.5f}")
    print(f"  likeliest {choice} the same at {found.same_code:.1%} of positions, probabilities overlap by {found.overlap:.1%}")


def _run_precision_search(arguments: argparse.Namespace) -> None:
    from tokenflow_export.progress import ProgressSteps
    from tokenflow_sdk.bundle.bundle import bundle_kind

    if arguments.crops < 1 or not 0 < arguments.bar <= 1:
        raise ArgumentError(
            f"--crops {arguments.crops} and --bar {arguments.bar} measure nothing.", "Give 1 or more, and 0 to 1."
        )
    if arguments.decoded is not None and not 1 <= arguments.decoded <= arguments.crops:
        raise ArgumentError(f"--decoded {arguments.decoded} is not of the {arguments.crops} crops.", "Give 1 to --crops.")
    search = _search_generator if bundle_kind(arguments.bundle) == "generator" else _search_tokenizer
    with ProgressSteps() as steps:
        lines = search(arguments, steps)
    print("\n".join(lines))


def _search_generator(arguments: argparse.Namespace, steps: ProgressSteps) -> list[str]:
    from tokenflow_export.precision.generator_search import search_generator
    from tokenflow_sdk.bundle.bundle import Bundle
    from tokenflow_sdk.bundle.model_config import GeneratorConfig

    if arguments.images is not None:
        raise ArgumentError("A generator is measured on the steps that its bundle carries.", "Leave --images out.")
    bundle = Bundle.open(arguments.bundle, GeneratorConfig)
    bundle.verify()
    found = search_generator(bundle, arguments.precision, steps)
    return [f"{bundle.path} in {arguments.precision}, {found.positions} positions:", *found.lines()]


def _search_tokenizer(arguments: argparse.Namespace, steps: ProgressSteps) -> list[str]:
    from tokenflow_export.precision.search import crops
    from tokenflow_export.precision.tokenizer_search import search_tokenizer
    from tokenflow_sdk.bundle.bundle import Bundle
    from tokenflow_sdk.bundle.model_config import TokenizerConfig

    bundle = Bundle.open(arguments.bundle, TokenizerConfig)
    bundle.verify()
    if arguments.images is None:
        raise ArgumentError("A tokenizer is measured on photos.", "Give a directory of them as --images.")
    photos = pictures_in(arguments.images)
    images = crops(photos, arguments.crops, bundle.config.image_size)
    found = search_tokenizer(bundle, images, arguments.bar, arguments.precision, steps, arguments.decoded)
    title = f"{bundle.path} in {arguments.precision} against fp32, {found.pictures} crops of {len(photos)} photos:"
    return [title, *found.lines(bundle.config.patch_nums)]


def _run_calibrate(arguments: argparse.Namespace) -> None:
    from tokenflow_export.precision.calibrate import calibrate
    from tokenflow_export.precision.search import crops
    from tokenflow_export.progress import ProgressSteps
    from tokenflow_sdk.bundle.bundle import Bundle
    from tokenflow_sdk.bundle.model_config import TokenizerConfig

    bundle = Bundle.open(arguments.bundle, TokenizerConfig)
    bundle.verify()
    if arguments.crops < 1:
        raise ArgumentError(f"--crops {arguments.crops} measures nothing.", "Give 1 or more.")
    photos = pictures_in(arguments.images)
    held_out = pictures_in(arguments.held_out) if arguments.held_out else photos[::4]
    used = [photo for photo in photos if photo not in held_out]
    if not used:
        raise ArgumentError(f"{arguments.images} holds one picture only.", "Give several, or others as --held-out.")
    with ProgressSteps() as steps:
        # Directories hold alike photos side by side: crops are taken from all over them.
        images, others = (
            crops(paths[:: max(1, len(paths) // arguments.crops)], arguments.crops, bundle.config.image_size)
            for paths in (used, held_out)
        )
        found = calibrate(bundle, images, others, steps)
    print(
        f"{bundle.path}, ranges from {len(images)} crops of {len(used)} photos, "
        f"measured on {len(others)} crops of {len(held_out)} others "
        f"(the tokenizer itself: {found['int8'].own_psnr:.1f} dB):"
    )
    for dtype, cost in found.items():
        print(
            f"  {dtype:>4}  {cost.mean_psnr:.1f} dB, {cost.least_psnr:.1f} at least; "
            f"SSIM {cost.mean_ssim:.4f}, {cost.least_ssim:.4f} at least; "
            f"{cost.convolutions} convolutions, {cost.kept} kept in half; quantile {cost.quantile:g}"
        )


def _run_inspect(arguments: argparse.Namespace) -> None:
    from tokenflow_export.precision.inspect_layers import inspect_graph
    from tokenflow_sdk.bundle.bundle import Bundle
    from tokenflow_sdk.bundle.model_config import TokenizerConfig
    from tokenflow_sdk.parity.tokenizer import TokenizerReference

    bundle = Bundle.open(arguments.bundle, TokenizerConfig)
    reference = TokenizerReference.load(bundle)
    feed = bundle.graph(arguments.graph).inputs[0].name
    feeds = {feed: (reference.images if feed == "images" else reference.code_indices)[:1]}
    found = inspect_graph(bundle, arguments.graph, feeds, arguments.precision, arguments.backend)
    worst = set(sorted(found, key=lambda drift: drift.relative, reverse=True)[: arguments.top])
    print(f"{arguments.graph} in {arguments.precision} on {arguments.backend} against fp32 in onnxruntime:")
    print(f"  {len(found)} tensors in common; of these the {len(worst)} that differ most, in the order of the graph")
    for drift in found:
        if drift in worst:
            print(f"  {drift.relative:9.2e}  {'x'.join(map(str, drift.shape)):>20}  {drift.name}")


def _run_standin(arguments: argparse.Namespace) -> None:
    import torch

    from tokenflow_export.checkpoints.standin import standin_arrays
    from tokenflow_export.progress import ProgressSteps

    out: Path = arguments.out
    if out.exists():
        raise OutputError(f"{out} exists already.", "Delete it first, or choose another --out.")
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with ProgressSteps() as steps:
            steps.start(f"drawing {arguments.variant}")
            state = {key: torch.from_numpy(array) for key, array in standin_arrays(VARIANTS[arguments.variant])}
            steps.start(f"writing {out}")
            torch.save({"model": state}, partial)
            partial.rename(out)
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{out} cannot be written: {error}", "Choose another --out, or free some space.") from error
    finally:
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
