"""Export trained models to their bundles.

    python -m recipes.tiny.export --tokenizer data/tiny/tokenizer --out models/tiny
    python -m recipes.tiny.export --generator data/tiny/generator --out models/tiny
    python -m recipes.tiny.export --understander data/tiny/understander --out models/tiny

Of several trainings of an understander that began with the same weights, the mean of their weights is exported.

They are exported as the released models are. For that, the language models are written to directories in the released layouts.
Each is exported before the next is trained: language models read the tokenizer's codes, and the understander the drawings too.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as TextTokenizer
from torch import Tensor

from recipes.tiny.codes import codebook
from recipes.tiny.concepts import DRAWN_STYLES, THINGS
from recipes.tiny.config import TINY
from recipes.tiny.generator_model import SIZES, GeneratorModel
from recipes.tiny.prompts import BOS, NEGATIVE_PROMPT
from recipes.tiny.train_generator import load_generator
from recipes.tiny.train_tokenizer import load_tokenizer
from recipes.tiny.train_understander import load_understander
from recipes.tiny.understander_model import MAX_TOKENS, UnderstanderModel
from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_export.language_model.agreement import Agreement
from tokenflow_export.language_model.bundle_writer import ExportJob
from tokenflow_export.language_model.generator import export_generator
from tokenflow_export.language_model.understanding import export_understanding
from tokenflow_export.progress import ProgressSteps
from tokenflow_export.tokenizer.export import export_tokenizer
from tokenflow_export.tracing.weight_quantization import ExportPrecision
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig, TokenizerConfig, UnderstanderConfig

__all__ = ["KINDS", "main", "write_llava_layout", "write_released_layout"]

KINDS = ("tokenizer", "generator", "understander")
LICENSE = "Apache-2.0"
SOURCE = {"checkpoint": "trained by recipes/tiny", "license": LICENSE}
DRAWS = f"{len(THINGS)} things in {len(DRAWN_STYLES)} styles: {', '.join(sorted(THINGS.values()))}"
ANSWERS = "what is this, is there a ..., which colours, is it red, which style, is it a photograph, how many, describe it"
"""What `tokenflow info tiny` says that can be drawn, and asked."""
PRESET, CFG_SCALE = "fast", 1.5
"""The sampling preset and the guidance with which so small a model gives the best pictures."""


def write_released_layout(model: GeneratorModel, prompts: TextTokenizer, directory: Path) -> None:
    """Write a generator as config.json, tokenizer.json and model.safetensors with the released keys."""
    config = {
        "model_type": "llava_llama",
        "bos_token_id": BOS,
    }
    text, codes = model.text.weight, TINY.codebook_size
    # Ids are those of text, then of codes, then of <img>. Codes are not embedded by this table, and only codes are predicted.
    embeddings = torch.cat([text[:-1], text.new_zeros(codes, SIZES.width), text[-1:]])
    head = torch.zeros_like(embeddings)
    head[len(text) - 1 : len(text) - 1 + codes] = model.head.weight
    weights = {
        "model.embed_tokens.weight": embeddings,
        "lm_head.weight": head,
        "model.lvl_embed.weight": model.levels.weight,
        "model.pos_1LC": model.places.weight,
    }
    _write_layout(model, prompts, config, weights, directory)


def write_llava_layout(model: UnderstanderModel, text: TextTokenizer, directory: Path) -> None:
    """Write an understander as config.json, tokenizer.json and model.safetensors of a LLaVA directory in Qwen2's layout."""
    config = {
        "model_type": "llava_qwen",
        "vocab_size": model.text.num_embeddings,
        "tie_word_embeddings": True,
        "max_position_embeddings": MAX_TOKENS,
    }
    _write_layout(model, text, config, {"model.embed_tokens.weight": model.text.weight}, directory)


def _write_layout(
    model: GeneratorModel | UnderstanderModel,
    text: TextTokenizer,
    config: Mapping[str, object],
    weights: Mapping[str, Tensor],
    directory: Path,
) -> None:
    """Write a released directory: `config` and the transformer's sizes, `weights` and those that both models have."""
    sizes = model.transformer.config
    shared = {
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.kv_heads,
        "head_dim": sizes.head_dim,
        "intermediate_size": sizes.mlp_width,
        "rms_norm_eps": sizes.norm_eps,
        "rope_theta": sizes.rope_theta,
    }
    (directory / "config.json").write_text(json.dumps({**config, **shared}))
    text.save(str(directory / "tokenizer.json"))
    every = {f"model.{key}": value for key, value in model.transformer.state_dict().items()}
    every |= {f"model.mm_projector.{key}": value for key, value in model.projector.state_dict().items()}
    halves = {key: value.detach().half().float().contiguous() for key, value in {**every, **weights}.items()}
    save_file(halves, directory / "model.safetensors")


def _export_language_model(
    out: Path, kind: str, write: Callable[[Path], None], export: Callable[[ExportJob], Agreement], steps: ProgressSteps
) -> None:
    """Write a language model in its released layout, and export that to the bundle `out / kind` with int8 weights."""
    with tempfile.TemporaryDirectory() as work:
        # The directory's name is the checkpoint's in the bundle's provenance.
        checkpoint = Path(work) / "recipes-tiny"
        checkpoint.mkdir()
        write(checkpoint)
        tokenizer = Bundle.open(out / "tokenizer", TokenizerConfig)
        job = ExportJob(
            HfDirectory(checkpoint),
            tokenizer,
            out / kind,
            steps,
            force=True,
            precision=ExportPrecision("fp32", "int8"),
            compress=True,
            license=LICENSE,
        )
        agreement = export(job)
    print(f"{kind}: with int8 weights the likeliest code or token is the same at {agreement.same_code:.1%} of positions")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for kind in KINDS:
        several = "+" if kind == "understander" else None
        parser.add_argument(
            f"--{kind}", type=Path, nargs=several, help=f"where the {kind} was trained; none is exported without it"
        )
    parser.add_argument("--out", type=Path, default=Path("models/tiny"))
    parser.add_argument(
        "--cfg-scale", type=float, default=CFG_SCALE, help="guidance for requests that give none (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    out: Path = arguments.out
    with ProgressSteps() as steps:
        if arguments.tokenizer:
            export_tokenizer(load_tokenizer(arguments.tokenizer), out / "tokenizer", SOURCE, steps, force=True, compress=True)
        if arguments.generator:
            generator, prompts = load_generator(arguments.generator, codebook(out))
            _export_language_model(
                out,
                "generator",
                lambda directory: write_released_layout(generator, prompts, directory),
                lambda job: export_generator(job, NEGATIVE_PROMPT, PRESET, arguments.cfg_scale),
                steps,
            )
            bundle = Bundle.open(out / "generator", GeneratorConfig)
            replace(bundle, provenance={**bundle.provenance, "draws": DRAWS}).write_manifest()
        if arguments.understander:
            understander, text = load_understander(*arguments.understander)
            _export_language_model(
                out,
                "understander",
                lambda directory: write_llava_layout(understander, text, directory),
                export_understanding,
                steps,
            )
            # LLaVA's layout knows no `crop`; its pictures are prepared as the tokenizer's are.
            asking = Bundle.open(out / "understander", UnderstanderConfig)
            replace(
                asking,
                config=replace(asking.config, preprocess=None),
                provenance={**asking.provenance, "answers": ANSWERS},
            ).write_manifest()
    for kind in KINDS:
        (out / kind / "README.md").unlink(missing_ok=True)  # there is one card for all, which `recipes.tiny.report` writes
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
