from __future__ import annotations

import hashlib

import numpy as np

from tests.support.mini import MINI
from tokenflow_export.checkpoints.standin import standin_arrays, standin_weight


def test_weights_are_the_same_on_every_machine() -> None:
    digest = hashlib.sha256()
    for key, shape in (
        ("encoder.conv_in.weight", (128, 3, 3, 3)),
        ("encoder_vqkd.class_embedding", (768,)),
        ("encoder_vqkd.ln_pre.weight", (768,)),
        ("quantize.embedding_vqgan.weight", (32768, 8)),
        ("decoder_vqkd.blocks.0.attn.q_bias", (768,)),
        ("decoder_vqkd.pos_embed", (1, 197, 768)),
    ):
        digest.update(standin_weight(key, shape).tobytes())
    assert digest.hexdigest() == "7bb0d82be8aa3f108045a4b5cff7868aa7561a43bb3ec9021c71f03165e938d6"


def test_scaling_buffers_hold_their_published_constants() -> None:
    arrays = {k: v for k, v in standin_arrays(MINI["vitamin"]) if k.startswith("scaling")}
    assert np.allclose(arrays["scaling_layer.shift"].ravel(), [0.48145466, 0.4578275, 0.40821073])
    assert np.allclose(arrays["scaling_layer.scale"].ravel(), [0.26862954, 0.26130258, 0.27577711])
