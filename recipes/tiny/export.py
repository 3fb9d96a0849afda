"""Export the trained model to its bundles.

    python -m recipes.tiny.export --tokenizer data/tiny/tokenizer --generator data/tiny/generator --out models/tiny

Both are exported as the released models are. For that, the generator is written to a directory in the released layout.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as PromptTokenizer

from recipes.tiny.config import TINY
from recipes.tiny.generator_model import SIZES, GeneratorModel
from recipes.tiny.prompts import BOS, NEGATIVE_PROMPT
from recipes.tiny.train_generator import load_generator, load_tokenizer
from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_export.language_model.bundle_writer import ExportJob
from tokenflow_export.language_model.generator import export_generator
from tokenflow_export.progress import ProgressSteps
from tokenflow_export.tokenizer.export import export_tokenizer
from tokenflow_export.tracing.weight_quantization import ExportPrecision
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import GeneratorConfig, TokenizerConfig

__all__ = ["main", "write_released_layout"]

LICENSE = "Apache-2.0"
SOURCE = {"checkpoint": "trained by recipes/tiny", "license": LICENSE}
DRAWS = '145 things, most of them animals, plants and food, as "red apple", "tiger" or "rose", in up to six styles'
"""What `tokenflow info tiny` says that can be drawn."""
PRESET, CFG_SCALE = "fast", 1.5
"""The sampling preset and the guidance with which so small a model gives the best pictures."""


def write_released_layout(model: GeneratorModel, prompts: PromptTokenizer, directory: Path) -> None:
    """Write a generator as config.json, tokenizer.json and model.safetensors with the released keys."""
    config = {
        "model_type": "llava_llama",
        "hidden_size": SIZES.width,
        "num_hidden_layers": SIZES.layers,
        "num_attention_heads": SIZES.heads,
        "num_key_value_heads": SIZES.kv_heads,
        "head_dim": SIZES.head_dim,
        "intermediate_size": SIZES.mlp_width,
        "rms_norm_eps": SIZES.norm_eps,
        "rope_theta": SIZES.rope_theta,
        "bos_token_id": BOS,
    }
    (directory / "config.json").write_text(json.dumps(config))
    prompts.save(str(directory / "tokenizer.json"))
    text, codes = model.text.weight, TINY.codebook_size
    # Ids are those of text, then of codes, then of <img>. Codes are not embedded by this table, and only codes are predicted.
    embeddings = torch.cat([text[:-1], text.new_zeros(codes, SIZES.width), text[-1:]])
    head = torch.zeros_like(embeddings)
    head[len(text) - 1 : len(text) - 1 + codes] = model.head.weight
    weights = {f"model.{key}": value for key, value in model.transformer.state_dict().items()}
    weights |= {f"model.mm_projector.{key}": value for key, value in model.projector.state_dict().items()}
    weights |= {
        "model.embed_tokens.weight": embeddings,
        "lm_head.weight": head,
        "model.lvl_embed.weight": model.levels.weight,
        "model.pos_1LC": model.places.weight,
    }
    halves = {key: value.detach().half().float().contiguous() for key, value in weights.items()}
    save_file(halves, directory / "model.safetensors")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, default=Path("data/tiny/tokenizer"))
    parser.add_argument("--generator", type=Path, default=Path("data/tiny/generator"))
    parser.add_argument("--out", type=Path, default=Path("models/tiny"))
    parser.add_argument(
        "--cfg-scale", type=float, default=CFG_SCALE, help="guidance for requests that give none (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    model = load_tokenizer(arguments.tokenizer, torch.device("cpu"))
    out: Path = arguments.out
    with ProgressSteps() as steps, tempfile.TemporaryDirectory() as work:
        export_tokenizer(model, out / "tokenizer", SOURCE, steps, force=True, compress=True)
        generator, prompts = load_generator(arguments.generator, model)
        # The directory's name is the checkpoint's in the bundle's provenance.
        checkpoint = Path(work) / "recipes-tiny"
        checkpoint.mkdir()
        write_released_layout(generator, prompts, checkpoint)
        job = ExportJob(
            HfDirectory(checkpoint),
            Bundle.open(out / "tokenizer", TokenizerConfig),
            out / "generator",
            steps,
            force=True,
            precision=ExportPrecision("fp32", "int8"),
            compress=True,
            license=LICENSE,
        )
        agreement = export_generator(job, NEGATIVE_PROMPT, PRESET, arguments.cfg_scale)
        bundle = Bundle.open(out / "generator", GeneratorConfig)
        replace(bundle, provenance={**bundle.provenance, "draws": DRAWS}).write_manifest()
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"{out}: {size / 1e6:.1f} MB; int8 transformer: likeliest code the same at {agreement.same_code:.1%} of positions")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
