"""The eager models against the slow, obvious arithmetic of docs/model.md, and against the released code's outputs (slow)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.support.mini import MINI, mini_model
from tokenflow_export.models.quantizer import SharedQuantizer
from tokenflow_export.models.tokenizer import to_pixels, to_unit_range
from tokenflow_export.models.vitamin import ChannelNorm, DownsampleShortcut
from tokenflow_export.models.vqgan import Downsample


def test_pixels_are_truncated_not_rounded() -> None:
    y = torch.tensor([-2.0, -1.0, 0.0, 0.002, 1.0, 2.0]).reshape(1, 1, 1, 6).expand(1, 3, 1, 6)
    assert to_pixels(y)[0, 0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]
    assert to_unit_range(torch.tensor([[[[0, 255, 51]]]], dtype=torch.uint8)).flatten().tolist() == pytest.approx([-1, 1, -0.6])


def test_downsampling_pads_right_and_bottom() -> None:
    layer = Downsample(1)
    layer.conv.weight.data = torch.arange(9.0).reshape(1, 1, 3, 3)
    layer.conv.bias.data.zero_()
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    padded = np.zeros((5, 5))
    padded[:4, :4] = x.numpy()[0, 0]
    expected = [[(padded[i : i + 3, j : j + 3] * np.arange(9).reshape(3, 3)).sum() for j in (0, 2)] for i in (0, 2)]
    assert layer(x)[0, 0].tolist() == expected


def test_the_pooled_shortcut_does_not_count_padding() -> None:
    found = DownsampleShortcut(2, 2)(torch.ones(1, 2, 4, 4))
    assert torch.equal(found, torch.ones(1, 2, 2, 2))


def test_channel_norm_is_over_channels() -> None:
    norm = ChannelNorm(8)
    x = torch.randn(2, 8, 3, 5, generator=torch.Generator().manual_seed(0))
    found = norm(x)
    assert found.mean(dim=1).abs().max() < 1e-6
    assert (found.var(dim=1, unbiased=False) - 1).abs().max() < 1e-4


def test_the_quantizer_is_the_specs_search() -> None:
    """One cell at a time, in float64, with loops."""
    config = MINI["clip"]
    quantizer: SharedQuantizer = mini_model("clip").quantize
    h = torch.randn(1, 40, 4, 4, generator=torch.Generator().manual_seed(1))
    codes, out = quantizer.encode(h)
    semantic = quantizer.embedding_vqkd.weight.double().numpy()
    pixel = quantizer.embedding_vqgan.weight.double().numpy()
    semantic /= np.linalg.norm(semantic, axis=1, keepdims=True)
    pixel /= np.linalg.norm(pixel, axis=1, keepdims=True)
    residual, total, found = h[0].double().numpy(), np.zeros((40, 4, 4)), []
    for side in config.patch_nums:
        q = np.zeros((40, side, side))
        for i in range(side):
            for j in range(side):
                rows = slice(i * 4 // side, -((i + 1) * 4 // -side)), slice(j * 4 // side, -((j + 1) * 4 // -side))
                cell = residual[:, rows[0], rows[1]].mean(axis=(1, 2))
                s, p = cell[:32] / np.linalg.norm(cell[:32]), cell[32:] / np.linalg.norm(cell[32:])
                k = int(np.argmin(((s - semantic) ** 2).sum(axis=1) + ((p - pixel) ** 2).sum(axis=1)))
                found.append(k)
                q[:, i, j] = np.concatenate([semantic[k], pixel[k]])
        up = torch.nn.functional.interpolate(torch.from_numpy(q)[None], size=(4, 4), mode="bicubic")[0].numpy()
        total, residual = total + up, residual - up
    assert codes[0].tolist() == found
    assert np.abs(out[0].numpy() - total).max() < 1e-5
    assert torch.allclose(quantizer.decode(codes), out, atol=1e-6)
    assert torch.allclose(
        quantizer.decode(codes[:, :5]),
        quantizer.upsample(quantizer.lookup(codes[:, :1].view(1, 1, 1)), 4)
        + quantizer.upsample(quantizer.lookup(codes[:, 1:5].view(1, 2, 2)), 4),
        atol=1e-6,
    )


@pytest.mark.parametrize("kind", MINI)
def test_unused_keys_change_nothing(kind: str) -> None:
    """The encoder reads hidden_states[-2]; CLIP's `proj` and SigLIP's last layer and head are not in the model at all."""
    names = " ".join(dict(mini_model(kind).named_parameters()))
    assert not any(part in names for part in ("vision_model.head", "post_layernorm", "layers.2.", "encoder_vqkd.proj"))


def test_clip_reads_raw_x_and_the_others_a_normalised_one() -> None:
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).reshape(1, 1, 1, 5).expand(1, 3, 1, 5)
    assert torch.equal(mini_model("clip").scaling_layer(x), x)
    siglip = mini_model("siglip").scaling_layer(x)
    assert siglip[0, 0, 0].tolist() == [-1.0, -1.0, 0.0, 1.0, 1.0]
    vitamin = mini_model("vitamin").scaling_layer(x)
    assert vitamin[0, 2, 0, 3].item() == pytest.approx((1 - 0.40821073) / 0.27577711, rel=1e-5)
