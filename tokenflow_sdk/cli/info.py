"""`tokenflow info`: prints what a file of codes or a bundle holds, and how the bundle would run on this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tokenflow_sdk.bundle.bundle import MANIFEST, Bundle, open_bundle
from tokenflow_sdk.bundle.model_config import PAGE_SIZE, GeneratorConfig, TokenizerConfig, UnderstanderConfig
from tokenflow_sdk.bundle.schema import GraphEntry
from tokenflow_sdk.cli.console import make_table, stdout
from tokenflow_sdk.cli.environment import environment, print_environment
from tokenflow_sdk.cli.generate import read_metadata
from tokenflow_sdk.cli.opening import bundle_name, bundle_paths, named_bundle, shown_path
from tokenflow_sdk.engines.build_config import BuildConfig
from tokenflow_sdk.engines.cache import CachedEngine, EngineCache, graph_digest
from tokenflow_sdk.engines.choice import Candidate, survey
from tokenflow_sdk.engines.jobs import EngineJob
from tokenflow_sdk.engines.memory_plan import memory_plans
from tokenflow_sdk.engines.options import RuntimeOptions
from tokenflow_sdk.engines.profiles import graph_profiles
from tokenflow_sdk.errors import OutputError
from tokenflow_sdk.files import file_status, is_directory, is_regular
from tokenflow_sdk.parity.certificate import Certificate
from tokenflow_sdk.pictures.codes import Codes
from tokenflow_sdk.pictures.preparation import Preparation

__all__ = ["info"]


def info(arguments: argparse.Namespace) -> int:
    """Describe a file of codes, a drawn image, or every bundle under a name; without one, what is installed here."""
    target = Path(bundle_name(arguments))
    if named_bundle(arguments) is None:
        found = environment()
        _print_json(found) if arguments.json else print_environment(found)
    elif target.suffix.lower() == ".png" and is_regular(target):
        drawn = read_metadata(target)
        _print_json(drawn) if arguments.json else stdout.print("\n".join(f"{key}: {value}" for key, value in drawn.items()))
    elif target.name != MANIFEST and file_status(target) is not None and not is_directory(target):
        codes = Codes.load(target)
        _print_json(_codes_facts(codes)) if arguments.json else _codes_info(codes)
    else:
        _bundles_info([target.parent] if target.name == MANIFEST else bundle_paths(arguments), arguments)
    return 0


def _bundles_info(paths: Sequence[Path], arguments: argparse.Namespace) -> None:
    bundles = [open_bundle(path, arguments.sha256) for path in paths]
    ways = [list(survey(bundle, RuntimeOptions())) for bundle in bundles]
    if arguments.json:
        _print_json({"bundles": [_facts(*each) for each in zip(bundles, ways, strict=True)]})
        return
    for i, bundle in enumerate(bundles):
        if i > 0:
            stdout.print()
        _bundle_info(bundle, arguments.graphs)
        _print_choice(bundle, ways[i], explained=i > 0 and ways[i] == ways[i - 1])


def _print_json(found: object) -> None:
    stdout.write(json.dumps(found, indent=2) + "\n")


def _facts(bundle: Bundle[Any], ways: Sequence[Candidate]) -> dict[str, object]:
    """What is printed of a bundle, and the rest of its bundle.json, for --json."""
    return {
        "path": str(bundle.path),
        "kind": bundle.config.kind,
        "sha256": bundle.sha256,
        "license": bundle.provenance.get("license"),
        "bytes": sum(file.size for file in bundle.files()),
        "config": asdict(bundle.config),
        "graphs": {
            name: {
                "bytes": sum(file.size for file in graph.files),
                "inputs": [str(spec) for spec in graph.inputs],
                "outputs": [str(spec) for spec in graph.outputs],
            }
            for name, graph in bundle.graphs.items()
        },
        "parity": dict(bundle.parity),
        "provenance": dict(bundle.provenance),
        "runs_on": next((way.title for way in ways if way.chosen), None),
        "backends": [{"backend": way.title, "usable": way.usable, "why": way.reason} for way in ways],
    }


def _bundle_info(bundle: Bundle[Any], graphs: bool) -> None:
    """Print what a bundle is, its licence, sizes and parity; with `graphs` also its graphs and all of its provenance."""
    if isinstance(bundle.config, GeneratorConfig):
        _generator_info(bundle)
    elif isinstance(bundle.config, UnderstanderConfig):
        _understander_info(bundle)
    else:
        _tokenizer_info(bundle)
    source = bundle.provenance
    stdout.print(f"{_size(sum(file.size for file in bundle.files()))} in {len(bundle.graphs)} graphs")
    license_name, checkpoint = (source.get(key, "not recorded") for key in ("license", "checkpoint"))
    stdout.print(f"licence of the weights: {license_name}; checkpoint: {checkpoint}", soft_wrap=True)
    if graphs:
        _print_graphs(bundle.graphs)
    for key, value in source.items():
        if key in ("draws", "answers") or (graphs and key not in ("license", "checkpoint")):
            stdout.print(f"{key}: {value}", soft_wrap=True)
    stdout.print(f"SHA-256 of bundle.json: {bundle.sha256}", soft_wrap=True)


def _print_choice(bundle: Bundle[Any], ways: Sequence[Candidate], explained: bool) -> None:
    """Print the backend that would run a bundle on this machine and, unless `explained` before, why the others would not."""
    chosen = next((way for way in ways if way.chosen), None)
    what = "nothing that is installed" if chosen is None else f"{chosen.title}: {chosen.reason}"
    stdout.print(f"runs on {what}", style="bold", soft_wrap=True)
    for way in [] if explained else ways:
        if way is not chosen:
            verdict = "could run on" if way.usable else "not on"
            stdout.print(f"  {verdict} {way.title}: {way.reason}", soft_wrap=True)
    _print_engines(bundle)


def _print_engines(bundle: Bundle[Any]) -> None:
    """Print the bundle's engines in the cache, for any GPU, with the results of their comparison with the reference."""
    graphs = {graph_digest(entry) for entry in bundle.graphs.values()}
    sets: dict[tuple[str, str, BuildConfig], list[CachedEngine]] = {}
    try:
        cache = EngineCache()
        cached = cache.entries()
    except OutputError:
        # Without a home directory there is no cache; the lines above say so where a GPU could use one.
        return
    for engine in cached:
        config = BuildConfig.from_json(engine.build_config)
        if config is not None and engine.key.graph_sha256 in graphs:
            sets.setdefault((f"{config.backend} {engine.key.version}", engine.key.target, config), []).append(engine)
    if not sets:
        return
    table = make_table("engines", "for", "precision", "batch", "graphs", "size", "compared with the reference")
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
    for (title, target, config), engines in sets.items():
        _print_memory(bundle, config, engines, cache, f"{title} for {target}, {config.precision}")


def _print_memory(
    bundle: Bundle[Any], config: BuildConfig, engines: Sequence[CachedEngine], cache: EngineCache, title: str
) -> None:
    """Print the GPU memory that engines take, if TensorRT told it of all of them."""
    profiles = graph_profiles(bundle, config)
    jobs = [
        EngineJob(bundle.graph_path(name), bundle.graph(name), engine.key, profiles[name], config)
        for name, engine in {engine.key.graph: engine for engine in reversed(engines)}.items()
        if name in bundle.graphs
    ]
    for plan in memory_plans(jobs, cache, estimate=False):
        stdout.print(f"{title}: {plan}", soft_wrap=True)


def _codes_facts(codes: Codes) -> dict[str, object]:
    return {
        "variant": codes.variant,
        "codebook_id": codes.codebook_id,
        "codebook_size": codes.codebook_size,
        "patch_nums": list(codes.patch_nums),
        "codes": len(codes),
        "scales": codes.n_scales,
        "scale_ends": list(codes.scale_ends),
        "preparation": None if codes.preparation is None else str(codes.preparation),
    }


def _codes_info(codes: Codes) -> None:
    stdout.print(repr(codes), soft_wrap=True)
    stdout.print(_prepared(codes.preparation), soft_wrap=True)
    table = make_table("scale", "codes", "file may end at byte", "first codes")
    for i, (side, count) in enumerate(zip(codes.scales.sides, codes.scales.counts, strict=True)):
        if i == codes.n_scales:
            break
        first = " ".join(map(str, codes.scale(i).ravel()[:6]))
        table.add_row(f"{side} x {side}", str(count), f"{codes.scale_ends[i]:,}", first)
    stdout.print(table)


def _prepared(preparation: Preparation | None) -> str:
    if preparation is None:
        return "how its picture was prepared is not known"
    parts = [
        f"its picture was fitted by {preparation.preprocess}",
        "colours were converted to sRGB" if preparation.color == "srgb" else "colours were read as stored",
        "the JPEG was decoded at reduced size" if preparation.fast else "",
        "" if preparation.source is None else f"the SHA-256 of its file begins with {preparation.source}",
    ]
    return "; ".join(filter(None, parts))


def _tokenizer_info(bundle: Bundle[TokenizerConfig]) -> None:
    c = bundle.config
    bits = (c.codebook_size - 1).bit_length()
    stdout.print(f"{shown_path(bundle.path)}: TokenFlow tokenizer {c.variant}", style="bold", soft_wrap=True)
    stdout.print(f"{c.image_size} x {c.image_size} px, pictures are fitted by {c.preprocess}")
    stdout.print(
        f"{len(c.patch_nums)} scales ({' '.join(map(str, c.patch_nums))}): {c.n_codes} codes of {bits} bits", soft_wrap=True
    )
    stdout.print(
        f"codebook of {c.codebook_size} entries, {c.semantic_dim} semantic + {c.pixel_dim} pixel values, "
        f"{c.codebook_sha256[:16]}; semantic features {c.semantic_width} wide",
        soft_wrap=True,
    )
    # The figures are informative and of any form; those of other forms are left out.
    with suppress(LookupError, TypeError, ValueError, OverflowError):
        decoded = bundle.parity["decode_psnr"]
        stdout.print(
            f"export check: codes equal {bundle.parity['equal_codes']:.2%}, flips {len(bundle.parity['flips'])}, "
            f"decode {'identical' if decoded is None else f'{decoded:.1f} dB'} against PyTorch",
            soft_wrap=True,
        )


def _generator_info(bundle: Bundle[GeneratorConfig]) -> None:
    c = bundle.config
    _print_language_model(
        bundle,
        f"prompts of up to {c.max_prompt - 1} tokens; pictures of {c.n_codes} codes in {len(c.scales)} scales",
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
    stdout.print(f"{shown_path(bundle.path)}: TokenFlow {c.kind}", style="bold", soft_wrap=True)
    stdout.print(f"transformer of {c.layers} layers, width {c.width}, {c.kv_heads} key/value heads of {c.head_dim}")
    stdout.print(sizes)
    stdout.print(f"{pairing} {c.tokenizer_variant} (codebook {c.codebook_sha256[:16]}) at {c.tokenizer}", soft_wrap=True)
    _print_pages(bundle, c.image_pages(), c.default_pages())
    _print_check(bundle.parity, choice)


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
    table = make_table("graph", "size", "inputs", "outputs")
    for name, graph in graphs.items():
        tensors = ("\n".join(map(str, specs)) for specs in (graph.inputs, graph.outputs))
        table.add_row(name, _size(sum(file.size for file in graph.files)), *tensors)
    stdout.print(table)


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e6 else f"{count / 1e3:,.1f} KB"
