from __future__ import annotations

import copy
import importlib.util
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.support.fuzzing import examples
from tests.support.mini_generator import tokenizer_bundle
from tests.support.mini_understander import byte_fallback_tokenizer, byte_level_tokenizer, export_quietly
from tests.support.small_language_model import IDS, SIZES, exporters_logits, state_of, transformers_model, write_directory
from tokenflow_export.checkpoints.architecture import FAMILIES, read_architecture
from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_export.language_model import transformers_model as module
from tokenflow_export.language_model.agreement import OWN_MODEL, Agreement, open_on_cpu
from tokenflow_export.language_model.bundle_writer import ExportJob
from tokenflow_export.language_model.transformers_model import installed_version, run_transformers
from tokenflow_export.language_model.understanding_check import _expected
from tokenflow_export.progress import ProgressSteps
from tokenflow_export.tracing.weight_quantization import FULL_PRECISION
from tokenflow_sdk.bundle.bundle import Bundle
from tokenflow_sdk.bundle.model_config import UnderstanderConfig, pages_for
from tokenflow_sdk.errors import CheckpointError, MissingPackageError, ParityError
from tokenflow_sdk.model.transformer import PagedTransformer
from tokenflow_sdk.parity.language_model import run_pieces
from tokenflow_sdk.parity.understander import UnderstanderInputs, greedy_feeds

QWEN2 = SIZES | {"model_type": "llava_qwen"}
KINDS = {
    "llama": SIZES | {"model_type": "llava_llama", "head_dim": 6},
    "qwen2": QWEN2,
    "released": QWEN2
    | {"torch_dtype": "bfloat16", "rope_scaling": None, "use_cache": False, "return_dict": False, "pad_token_id": 39}
    | {"attn_implementation": "sdpa", "_attn_implementation": "sdpa", "mm_hidden_size": 40},
    "tied": QWEN2 | {"tie_word_embeddings": True, "head_dim": None},
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_transformers_computes_with_all_weights(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more than one module has its weights at a time."""
    model = transformers_model(KINDS[kind] | {"return_dict": True})
    directory = write_directory(tmp_path, KINDS[kind], state_of(model))
    made: list[Any] = []
    real = module._without_weights
    monkeypatch.setattr(module, "_without_weights", lambda directory: made.append(real(directory)) or made[0])
    real_tensor, most = HfDirectory.tensor, 0

    def tensor(self: HfDirectory, key: str) -> Tensor:
        nonlocal most
        most = max(most, sum(not value.is_meta for value in made[0].parameters()))
        return real_tensor(self, key)

    monkeypatch.setattr(HfDirectory, "tensor", tensor)
    hidden, logits = run_transformers(directory, IDS, lambda text: text)
    torch.testing.assert_close(logits, model(IDS[None]).logits[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden, model.model(IDS[None]).last_hidden_state[0], rtol=1e-5, atol=1e-5)
    assert most == 0
    assert all(value.is_meta for value in made[0].parameters())


def job_of(directory: HfDirectory, **options: Any) -> tuple[ExportJob, UnderstanderInputs]:
    steps = ProgressSteps()
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, SIZES["vocab_size"], count, np.int32) for count in (5, 6, 7)]
    inputs = UnderstanderInputs(ids[0], rng.standard_normal((3, 40), np.float32), *ids[1:])
    return ExportJob(directory, None, Path(), steps, **options), inputs  # type: ignore[arg-type]


@torch.inference_mode()
def test_a_config_that_is_read_wrongly_is_found(tmp_path: Path) -> None:
    """The exporter's own model would agree with graphs that were made from the same wrong values."""
    directory = write_directory(tmp_path, QWEN2, state_of(transformers_model(QWEN2)))
    right = read_architecture(directory, "pre")
    wrong = replace(right, rope_theta=20.0)
    job, inputs = job_of(directory)
    hidden, logits, whose = _expected(job, right, "lm_head.weight", inputs)
    assert whose == installed_version()
    own, _ = job_of(directory, use_transformers=False)
    for model, good in ((right, True), (wrong, False)):
        found, found_logits, own_name = _expected(own, model, "lm_head.weight", inputs)
        assert own_name == OWN_MODEL
        agreement = Agreement.of(found, hidden, found_logits, logits, whose)
        if good:
            agreement.require(FULL_PRECISION)
        else:
            with pytest.raises(ParityError, match=r"graphs differ from transformers \d"):
                agreement.require(FULL_PRECISION)


def test_without_transformers_the_own_model_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_directory(tmp_path, QWEN2, state_of(transformers_model(QWEN2)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    job, inputs = job_of(directory)
    assert _expected(job, read_architecture(directory, "pre"), "lm_head.weight", inputs)[2] == OWN_MODEL


def test_what_transformers_cannot_run_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = write_directory(tmp_path, QWEN2, state_of(transformers_model(QWEN2)))
    directory.config["num_attention_heads"] = "four"
    with pytest.raises(ParityError, match=r"transformers \d.* cannot run the model.*--without-transformers"):
        run_transformers(directory, IDS, lambda text: text)


@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
def test_a_transformers_that_does_not_read_the_base_of_rope_is_named(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = QWEN2 | {place: {"rope_type": "default", "rope_theta": 20.0}}
    directory = write_directory(tmp_path, values, state_of(transformers_model(values)))
    monkeypatch.setattr("transformers.__version__", "4.50.0")
    with pytest.raises(ParityError, match=rf"transformers 4.50.0 does not read the rope_theta in {place}"):
        run_transformers(directory, IDS, lambda text: text)


def test_a_transformers_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "found")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingPackageError, match="transformers cannot be imported: .*--without-transformers"):
        installed_version()


def sizes(width: int, layers: int, heads: int, kv_heads: int, mlp: int, eps: float, head_dim: int | None = None) -> Any:
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp,
        "rms_norm_eps": eps,
        "vocab_size": 300 + width,
    } | ({} if head_dim is None else {"head_dim": head_dim})


@st.composite
def any_sizes(draw: st.DrawFn) -> dict[str, Any]:
    kv_heads, groups, head_dim = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 6, 8]))
    own = draw(st.booleans())
    return sizes(
        kv_heads * groups * (2 * draw(st.integers(1, 4)) if own else head_dim),
        draw(st.integers(1, 3)),
        kv_heads * groups,
        kv_heads,
        draw(st.integers(4, 40)),
        draw(st.sampled_from([1e-6, 1e-5, 1e-2])),
        head_dim if own else None,
    )


FEW_SIZES = st.sampled_from(
    [sizes(16, 2, 4, 2, 24, 1e-5), sizes(18, 1, 3, 1, 7, 1e-2, 4), sizes(8, 3, 2, 2, 5, 1e-6), sizes(12, 1, 2, 1, 30, 1e-5, 8)]
)
"""For whole exports: of modules that differ in weights alone, the large ones are traced once."""


@st.composite
def checkpoints(draw: st.DrawFn, of_sizes: st.SearchStrategy[dict[str, Any]]) -> tuple[dict[str, Any], torch.dtype, str, int]:
    """A config.json, what weights are stored in, which head is stored, and a seed; some of each are not to be accepted."""
    values = draw(of_sizes) | {
        "model_type": draw(st.sampled_from(list(FAMILIES))),
        "max_position_embeddings": 64,
        "tie_word_embeddings": draw(st.booleans()),
    }
    theta = st.sampled_from([10.0, 1e4, 1000000])
    rope = st.fixed_dictionaries({}, optional={"rope_theta": theta, "rope_type": st.just("default")})
    places = st.fixed_dictionaries({}, optional={"rope_theta": theta, "rope_scaling": rope, "rope_parameters": rope})
    odd = {
        "sliding_window": st.sampled_from([None, 4]),
        "use_sliding_window": st.booleans(),
        "max_window_layers": st.integers(0, 2),
        "attention_bias": st.sampled_from([None, False, True]),
        "auto_map": st.none(),
        "head_dim": st.none(),
        "hidden_act": st.sampled_from(["silu", "swish", "gelu"]),
        "partial_rotary_factor": st.sampled_from([0.5, 1.0]),
        "rope_scaling": st.just({"rope_type": "linear", "factor": 2.0}),
        "initializer_range": st.just(0.5),
        "attention_multiplier": st.just(0.01),
    }
    values |= draw(places)
    if draw(st.booleans()):
        values |= draw(st.dictionaries(st.sampled_from(list(odd)), st.none(), max_size=2).flatmap(
            lambda chosen: st.fixed_dictionaries({key: odd[key] for key in chosen})
        ))  # fmt: skip
    dtype = draw(
        st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.float8_e4m3fn])
    )
    return values, dtype, draw(st.sampled_from(["as saved", "equal", "other"])), draw(st.integers(0, 2**31))


def write_drawn(path: Path, drawn: tuple[dict[str, Any], torch.dtype, str, int]) -> tuple[HfDirectory, Any]:
    """The directory of a drawn checkpoint, and transformers' model with the weights that it holds."""
    values, dtype, head, seed = drawn
    model = transformers_model(values, seed)
    stored = {key: (value * 40 if dtype == torch.int8 else value).to(dtype) for key, value in state_of(model).items()}
    model.load_state_dict({key: value.float() for key, value in stored.items()}, strict=False)
    if model.config.tie_word_embeddings and head != "as saved":
        table = stored["model.embed_tokens.weight"].float()
        stored["lm_head.weight"] = (table if head == "equal" else table.flip(0)).to(dtype)
    directory = write_directory(path, values, stored)
    tokenizer = byte_level_tokenizer() if FAMILIES[values["model_type"]].name == "Qwen2" else byte_fallback_tokenizer()
    tokenizer.save(str(path / "tokenizer.json"))
    return directory, model


def bundles_logits(path: Path, ids: Tensor) -> Tensor:
    """Logits [Q, V] of a bundle's graphs, in onnxruntime."""
    bundle, count = Bundle.open(path, UnderstanderConfig), len(ids)
    with open_on_cpu(bundle, "embed_text") as session:
        embeddings = np.array(session.run({"token_ids": ids.numpy().astype(np.int32)[None]}, ["embeddings"])["embeddings"])
    with open_on_cpu(bundle, "transformer") as session:
        paged = PagedTransformer.of(bundle.config, session, pages_for(count, 4), page_size=4)
        hidden = run_pieces(paged, [(embeddings, np.arange(1, count + 1, dtype=np.int32))], count)
    with open_on_cpu(bundle, "head") as session:
        return torch.from_numpy(np.array(session.run(greedy_feeds(hidden, bundle.config), ["logits"])["logits"]))


def require_equal(found: Tensor, model: Any) -> None:
    """Equal but for rounding, which is large where a norm divides by almost nothing: as transformers' own against float64."""
    expected = model(IDS[None]).logits[0]
    rounding = (expected - copy.deepcopy(model).double()(IDS[None]).logits[0]).abs().amax(dim=-1, keepdim=True)
    assert ((found - expected).abs() <= 1e-4 * max(1.0, float(expected.abs().max())) + 10 * rounding).all()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(checkpoints(any_sizes()))
def test_random_checkpoints_are_read_as_transformers_reads_them_or_refused(
    drawn: tuple[dict[str, Any], torch.dtype, str, int],
) -> None:
    with tempfile.TemporaryDirectory() as work:
        directory, model = write_drawn(Path(work), drawn)
        try:
            found = exporters_logits(directory, IDS)
        except CheckpointError:
            return
        require_equal(found, model)


@pytest.mark.slow
@pytest.mark.fuzz
@examples(10)
@given(checkpoints(FEW_SIZES))
def test_bundles_of_random_checkpoints_compute_what_transformers_computes(
    drawn: tuple[dict[str, Any], torch.dtype, str, int],
) -> None:
    """The same through whole exports. Those that are refused are refused before anything is traced."""
    with tempfile.TemporaryDirectory() as work:
        directory, model = write_drawn(Path(work) / "hf", drawn)
        tokenizer = tokenizer_bundle(Path(work) / "tok", (1, 2), 500)
        try:
            out = export_quietly(directory.path, tokenizer, Path(work) / "out")
        except CheckpointError:
            return
        require_equal(bundles_logits(out, IDS), model)
