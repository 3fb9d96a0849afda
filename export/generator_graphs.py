"""The generator as graphs: embeddings, one paged transformer step, and guided sampling.

One transformer graph with one copy of the weights serves prefill, every scale and every token. Keys and values live in pages:
the graph gathers the pages that each row's block table names, appends the step's own, and gives the new ones back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.models.llama import Transformer, rope_angles

__all__ = ["EmbedImageGraph", "EmbedTextGraph", "SampleGraph", "TransformerGraph"]


class EmbedTextGraph(nn.Module):
    """token_ids int32 [B, Q], starts float32 [B, Q] -> embeddings [B, Q, H].

    Ids count rows of `table`, which has the text's level embedding added and leaves the image tokens out. `starts` is 1 at
    the image start token, which takes the first image position as well.
    """

    def __init__(self, table: Tensor, first_position: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.register_buffer("first_position", first_position)

    def forward(self, token_ids: Tensor, starts: Tensor) -> Tensor:
        return F.embedding(token_ids, self.table).float() + starts[..., None] * self.first_position


class EmbedImageGraph(nn.Module):
    """features float32 [B, Q, 40], level int32 [1], places int32 [Q] -> embeddings [B, Q, H]: projector + level + position."""

    def __init__(self, projector: nn.Module, levels: Tensor, positions: Tensor) -> None:
        super().__init__()
        self.projector = projector
        self.register_buffer("levels", levels)
        self.register_buffer("positions", positions)

    def forward(self, features: Tensor, level: Tensor, places: Tensor) -> Tensor:
        return self.projector(features) + (F.embedding(level, self.levels) + F.embedding(places, self.positions))


class TransformerGraph(nn.Module):
    """One step over paged keys and values.

    Inputs: embeddings [B, Q, H]; positions int32 [B, Q] for RoPE; visible int32 [B, Q], how many of the step's own keys each
    query sees, in order (q + 1 is causal, Q bidirectional); context int32 [B], cached tokens of each row; block_tables
    int32 [B, P]; k_pages and v_pages [layers * N, page, kv_heads, D]. Outputs: hidden [B, Q, H] after the final norm; new_k
    and new_v [layers, B, Q, kv_heads, D]. The type of the pages is that of the arithmetic; embeddings and hidden are float32.
    """

    def __init__(self, transformer: Transformer) -> None:
        super().__init__()
        self.transformer = transformer
        self.config = transformer.config

    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor,
        visible: Tensor,
        context: Tensor,
        block_tables: Tensor,
        k_pages: Tensor,
        v_pages: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        config, batch, length = self.config, embeddings.shape[0], embeddings.shape[1]
        slots = block_tables.shape[1] * k_pages.shape[1]
        seen = torch.arange(slots)[None, None] < context[:, None, None]
        own = torch.arange(length)[None, None] < visible[..., None]
        mask = torch.cat([seen.expand(batch, length, slots), own], dim=-1)
        cos, sin = rope_angles(positions, config.head_dim, config.rope_theta)
        pages = k_pages.shape[0] // config.layers
        x, new_k, new_v = embeddings.to(k_pages.dtype), [], []
        for index, layer in enumerate(self.transformer.layers):
            rows = block_tables + index * pages
            past = [
                F.embedding(rows, pool.flatten(1)).reshape(batch, slots, config.kv_heads, -1) for pool in (k_pages, v_pages)
            ]
            x, k, v = layer(x, cos, sin, past[0], past[1], mask)
            new_k.append(k)
            new_v.append(v)
        return self.transformer.norm(x).float(), torch.stack(new_k), torch.stack(new_v)


class SampleGraph(nn.Module):
    """Guided top-k, top-p sampling of image codes by inverse CDF (spec section 4); `tokenflow_sdk.sampling.draw` is its twin.

    Inputs: conditional and unconditional [R, Q, H]; guidance and top_p float32 [R]; top_k int32 [R]; noise float32 [R, Q];
    ranks int32 [W], the numbers 0 .. W - 1, W at least every top_k. Outputs: code_indices int32 [R, Q]; logits [R, Q, K].
    Only the W likeliest are sorted. The head has no bias, so guidance is applied to its input: one product, not two.
    """

    def __init__(self, head: Tensor) -> None:
        super().__init__()
        self.register_buffer("head", head)

    def forward(
        self,
        conditional: Tensor,
        unconditional: Tensor,
        guidance: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        noise: Tensor,
        ranks: Tensor,
    ) -> tuple[Tensor, Tensor]:
        t = guidance[:, None, None]
        guided = (1 + t) * conditional - t * unconditional
        logits = F.linear(guided.to(self.head.dtype), self.head).float()
        values, order = logits.topk(ranks.shape[0], dim=-1)
        kth = values.gather(-1, (top_k.long() - 1)[:, None, None].expand(-1, values.shape[1], 1))
        kept = torch.where(values < kth, -1e30, values)
        weights = kept.softmax(dim=-1)
        # Sorted from the likeliest down: a token stays while those before it hold less than p; the first always does.
        before = weights.cumsum(dim=-1) - weights
        nucleus = (before < top_p[:, None, None]) | (ranks == 0)
        weights = torch.where(nucleus, weights, 0.0)
        cumulative = weights.cumsum(dim=-1)
        place = (cumulative <= noise[..., None] * cumulative[..., -1:]).sum(dim=-1, keepdim=True)
        return order.gather(-1, place)[..., 0].to(torch.int32), logits
