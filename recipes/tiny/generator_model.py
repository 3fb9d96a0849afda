"""The generator as it is trained: the exporter's transformer with embeddings and head, over whole sequences."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.tiny.config import TINY
from recipes.tiny.prompts import PAD
from tokenflow_export.models.config import TransformerConfig
from tokenflow_export.models.llama import Attention, KeysValues, Transformer
from tokenflow_sdk.pictures.resize import bicubic_matrix

__all__ = ["SIZES", "GeneratorModel"]

SIZES = TransformerConfig(
    width=256,
    layers=8,
    heads=4,
    kv_heads=4,
    head_dim=64,
    mlp_width=704,
    norm_eps=1e-5,
    rope_theta=10000.0,
    norm_placement="output",
    qk_norm=True,
    qkv_bias=False,
)
MAX_PROMPT = 128


class FusedAttention(Attention):
    """Attention without a past by PyTorch's fused kernel, which makes training faster but does not trace to ONNX."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: KeysValues | None, bias: Tensor) -> Tensor:
        # The kernel takes no keys and values that heads share. Without it attention is several times slower.
        q, k, v = (x.transpose(1, 2).expand(-1, self.config.heads, -1, -1) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, 0].to(q.dtype))
        result: Tensor = self.o_proj(out.transpose(1, 2).flatten(2))
        return result


class GeneratorModel(nn.Module):
    """Embeddings, transformer and head (docs/model.md, section 4).

    Args:
        text_size: how many text tokens there are; `<img>` is the last of them.
        codebook: float32 [K, C], both halves of unit length.
    """

    codebook: Tensor

    def __init__(self, text_size: int, codebook: Tensor) -> None:
        super().__init__()
        width = SIZES.width
        self.register_buffer("codebook", codebook)
        self.text = nn.Embedding(text_size, width)
        self.projector = nn.Sequential(nn.Linear(codebook.shape[1], width), nn.GELU(), nn.Linear(width, width))
        self.levels = nn.Embedding(len(TINY.patch_nums) + 1, width)
        self.places = nn.Embedding(TINY.n_codes, width)
        self.transformer = Transformer(SIZES, FusedAttention)
        self.head = nn.Linear(width, len(codebook), bias=False)
        for name, parameter in self.named_parameters():
            if name.endswith("layernorm.weight"):
                # These norms come after a sublayer, so their weights scale what it adds to the residual stream.
                nn.init.constant_(parameter, 0.3)
            elif name.endswith("norm.weight"):
                nn.init.ones_(parameter)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)
        sides = TINY.patch_nums
        self.up = [torch.from_numpy(bicubic_matrix(a, b)).float() for a, b in pairwise(sides)]

    def forward(self, prompts: Sequence[Sequence[int]], codes: Tensor, scales: int, resampled: Tensor | None) -> Tensor:
        """The logits [B, L, K] of the codes of the `scales` coarsest scales.

        Args:
            prompts: token ids of each row, BOS first. codes: the right codes [B, L] of these scales; more may follow. scales:
            how many scales the sequence has. resampled: codes [B, s * s] of the last scale as a first pass may have sampled
            them. The inputs of that scale are then
                those of a refinement pass; with None they are those of a first pass.
        """
        text, seen = self._text(prompts, codes.device)
        images = self._images(codes, scales, resampled)
        x = torch.cat([text, *images], dim=1)
        positions, mask = self._geometry(text.shape[1], [image.shape[1] for image in images], seen)
        hidden = self.transformer(x, positions, mask)
        logits: Tensor = self.head(hidden[:, text.shape[1] - 1 :])
        return logits

    def _text(self, prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Embed padded prompts and `<img>`: [B, T, H], and a mask [B, T] that is false at pads."""
        longest = max(map(len, prompts))
        start = self.text.num_embeddings - 1
        ids = torch.tensor([[PAD] * (longest - len(row)) + [*row, start] for row in prompts], device=device)
        seen = torch.tensor([[False] * (longest - len(row)) + [True] * (len(row) + 1) for row in prompts], device=device)
        x = self.text(ids) + self.levels.weight[0]
        return torch.cat([x[:, :-1], x[:, -1:] + self.places.weight[0]], dim=1), seen

    def _images(self, codes: Tensor, scales: int, resampled: Tensor | None) -> list[Tensor]:
        """Embed the inputs of scales 2 .. `scales`, each [B, s * s, H]."""
        sides, images = TINY.patch_nums, []
        maps, place = codes.new_zeros((len(codes), self.codebook.shape[1], 1, 1)).float(), 0
        for index, side in enumerate(sides[:scales]):
            stop = place + side * side
            if index:
                last = index == scales - 1 and resampled is not None
                features = maps + self._rows(resampled, side) if last and resampled is not None else maps
                x = self.projector(features.flatten(2).transpose(1, 2))
                images.append(x + self.levels.weight[index + 1] + self.places.weight[place:stop])
            if index + 1 < scales:
                up = self.up[index].to(codes.device)
                maps = up @ (maps + self._rows(codes[:, place:stop], side)) @ up.T
            place = stop
        return images

    def _rows(self, codes: Tensor, side: int) -> Tensor:
        return torch.unflatten(F.embedding(codes, self.codebook).transpose(1, 2), 2, (side, side))

    def _geometry(self, text: int, counts: Sequence[int], seen: Tensor) -> tuple[Tensor, Tensor]:
        """Positions [1, Q] and mask [B, Q, Q]: text is causal, each scale is bidirectional, and pads are not seen."""
        total = text + sum(counts)
        positions = torch.arange(MAX_PROMPT - text + 1, MAX_PROMPT - text + 1 + total, device=seen.device)
        mask = torch.ones(total, total, dtype=torch.bool, device=seen.device).tril()
        start = text
        for count in counts:
            mask[start : start + count, start : start + count] = True
            start += count
        keys = torch.cat([seen, seen.new_ones(len(seen), total - text)], dim=1)
        # Each query sees itself, so that no row of the mask is empty.
        own = torch.eye(total, dtype=torch.bool, device=seen.device)
        return positions[None], (mask & keys[:, None]) | own
