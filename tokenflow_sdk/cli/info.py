"""`tokenflow info`: prints what a file of codes or a bundle holds, and how the bundle would run on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from tokenflow_sdk.bundle.bundle import MANIFEST, Bundle, open_bundle
from tokenflow_sdk.bundle.model_config import PAGE_SIZE, GeneratorConfig, TokenizerConfig, UnderstanderConfig
from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.cli.console import stdout
from tokenflow_sdk.cli.opening import bundle_name, bundle_paths
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.cache import CachedEngine, EngineCache, graph_digest
from tokenflow_sdk.engines.choice import survey
from tokenflow_sdk.engines.options import RuntimeOptions
from tokenflow_sdk.errors import OutputError
from tokenflow_sdk.files import file_status, is_directory
from tokenflow_sdk.parity.certificate import Certificate
from tokenflow_sdk.pictures.codes import Codes

__all__ = ["info"]


def info(arguments: argparse.Namespace) -> int:
    """Describe a file of codes, or every bundle under a name."""
    target = Path(bundle_name(arguments))
    if target.name != MANIFEST and file_status(target) is not None and not is_directory(target):
        _codes_info(target)
        return 0
    for path in [target.parent] if target.name == MANIFEST else bundle_paths(arguments):
        bundle = open_bundle(path, arguments.sha256)
        if isinstance(bundle.config, GeneratorConfig):
            _generator_info(bundle)
        elif isinstance(bundle.config, UnderstanderConfig):
            _understander_info(bundle)
        else:
            _tokenizer_info(bundle)
    return 0


def _print_choice(bundle: Bundle[Any]) -> None:
    """Print the backend that would run a bundle on this machine, and for all others why they would not."""
    table, chosen = Table("backend", "here", "why"), None
    for candidate in survey(bundle, RuntimeOptions()):
        chosen = chosen or (candidate.title if candidate.usable else None)
        table.add_row(candidate.title, "yes" if candidate.usable else "no", candidate.reason)
    stdout.print(f"runs on {chosen or 'nothing that is installed'}", style="bold")
    stdout.print(table)
    _print_engines(bundle)


def _print_engines(bundle: Bundle[Any]) -> None:
    """Print the bundle's engines in the cache, for any GPU, with the results of their comparison with the reference."""
    graphs = {graph_digest(entry) for entry in bundle.graphs.values()}
    sets: dict[tuple[str, str, BuildConfig], list[CachedEngine]] = {}
    try:
        cached = EngineCache().entries()
    except OutputError:
        # Without a home directory there is no cache; the table above says so where a GPU could use one.
        return
    for engine in cached:
        config = BuildConfig.from_json(engine.build_config)
        if config is not None and engine.key.graph_sha256 in graphs:
            sets.setdefault((f"{config.backend} {engine.key.version}", engine.key.target, config), []).append(engine)
    if not sets:
        return
    table = Table("engines", "for", "precision", "batch", "graphs", "size", "compared with the reference")
    for (title, target, config), engines in sets.items():
        certificates = [
            Certificate.from_json(engine.certificates.get(architecture, {}))
            for engine in engines
            for architecture in engine.key.targets
        ]
        worst = next((c for c in certificates if c is None or not c.passed), certificates[0])
        verdict = "not yet: at first use" if worst is None else worst.summary if worst.passed else "; ".join(worst.failures)
        precision = config.precision if config.decoder is None else f"{config.precision}, decoder {config.decoder}"
        names = ", ".join(sorted(engine.key.graph for engine in engines))
        size = _size(sum(engine.size for engine in engines))
        table.add_row(title, target, precision, ",".join(map(str, config.batch)), names, size, verdict)
    stdout.print(table)


def _codes_info(path: Path) -> None:
    codes = Codes.load(path)
    stdout.print(repr(codes), soft_wrap=True)
    stdout.print(f"picture prepared by {codes.preparation or 'what is not known'}", soft_wrap=True)
    table = Table("scale", "codes", "file may end at byte", "first codes")
    for i, (side, count) in enumerate(zip(codes.scales.sides, codes.scales.counts, strict=True)):
        if i == codes.n_scales:
            break
        first = " ".join(map(str, codes.scale(i).ravel()[:6]))
        table.add_row(f"{side} x {side}", str(count), f"{codes.scale_ends[i]:,}", first)
    stdout.print(table)


def _tokenizer_info(bundle: Bundle[TokenizerConfig]) -> None:
    c = bundle.config
    bits = (c.codebook_size - 1).bit_length()
    stdout.print(f"{bundle.path}: TokenFlow tokenizer {c.variant}", style="bold", soft_wrap=True)
    stdout.print(f"{c.image_size} x {c.image_size} px, pictures are fitted by {c.preprocess}")
    stdout.print(
        f"{len(c.patch_nums)} scales ({' '.join(map(str, c.patch_nums))}): {c.n_codes} codes of {bits} bits", soft_wrap=True
    )
    stdout.print(
        f"codebook of {c.codebook_size} entries, {c.semantic_dim} semantic + {c.pixel_dim} pixel values, "
        f"{c.codebook_sha256[:16]}; semantic features {c.semantic_width} wide",
        soft_wrap=True,
    )
    _print_graphs(bundle.graphs)
    # The figures are informative and of any form; those of other forms are left out.
    with suppress(LookupError, TypeError, ValueError, OverflowError):
        decoded = bundle.parity["decode_psnr"]
        stdout.print(
            f"export check: codes equal {bundle.parity['equal_codes']:.2%}, flips {len(bundle.parity['flips'])}, "
            f"decode {'identical' if decoded is None else f'{decoded:.1f} dB'} against PyTorch",
            soft_wrap=True,
        )
    _print_provenance(bundle)
    _print_choice(bundle)


def _generator_info(bundle: Bundle[GeneratorConfig]) -> None:
    c = bundle.config
    _print_language_model(
        bundle,
        f"prompts of up to {c.max_prompt} tokens; pictures of {c.n_codes} codes in {len(c.scales)} scales",
        "drawn for",
        "code",
    )


def _understander_info(bundle: Bundle[UnderstanderConfig]) -> None:
    c = bundle.config
    _print_language_model(
        bundle,
        f"{c.vocabulary} tokens, up to {c.context} in a conversation, {c.image_tokens} of them a picture's; "
        f"pictures are fitted {'as by its tokenizer' if c.preprocess is None else f'by {c.preprocess}'}",
        "reads codes of",
        "token",
    )


def _print_language_model(
    bundle: Bundle[GeneratorConfig] | Bundle[UnderstanderConfig], sizes: str, pairing: str, choice: str
) -> None:
    c = bundle.config
    stdout.print(f"{bundle.path}: TokenFlow {c.kind}", style="bold", soft_wrap=True)
    stdout.print(f"transformer of {c.layers} layers, width {c.width}, {c.kv_heads} key/value heads of {c.head_dim}")
    stdout.print(sizes)
    stdout.print(f"{pairing} {c.tokenizer_variant} (codebook {c.codebook_sha256[:16]}) at {c.tokenizer}", soft_wrap=True)
    _print_graphs(bundle.graphs)
    _print_pages(bundle, c.image_pages(), c.default_pages())
    _print_check(bundle.parity, choice)
    _print_provenance(bundle)
    _print_choice(bundle)


def _print_pages(bundle: Bundle[GeneratorConfig] | Bundle[UnderstanderConfig], taken: int, pages: int) -> None:
    """Print the memory of a key/value page, of the `taken` pages of an image, and of a pool of `pages`."""
    c = bundle.config
    value = next(np.dtype(spec.dtype).itemsize for spec in bundle.graph("transformer").inputs if spec.name == "k_pages")
    page = 2 * value * PAGE_SIZE * c.layers * c.kv_heads * c.head_dim
    stdout.print(
        f"key/value cache: pages of {PAGE_SIZE} tokens, {_size(page)} each; a picture takes {taken} pages "
        f"({_size(taken * page)}); the default pool has {pages} ({_size(pages * page)})",
        soft_wrap=True,
    )


def _print_check(parity: Mapping[str, Any], choice: str) -> None:
    with suppress(LookupError, TypeError, ValueError, OverflowError):
        stdout.print(
            f"export check against float32 PyTorch: likeliest {choice} the same at {parity['same_code']:.1%} of positions, "
            f"probabilities overlap by {parity['overlap']:.1%}",
            soft_wrap=True,
        )


def _print_graphs(graphs: Mapping[str, GraphEntry]) -> None:
    table = Table("graph", "size", "inputs", "outputs")
    for name, graph in graphs.items():
        tensors = ("\n".join(map(str, specs)) for specs in (graph.inputs, graph.outputs))
        table.add_row(name, _size(sum(file.size for file in graph.files)), *tensors)
    stdout.print(table)


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} KB"


def _print_provenance(bundle: Bundle[Any]) -> None:
    for key, value in bundle.provenance.items():
        stdout.print(f"{key}: {value}", soft_wrap=True)
    stdout.print(f"SHA-256 of bundle.json: {bundle.sha256}", soft_wrap=True)
