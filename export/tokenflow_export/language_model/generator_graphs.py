"""The graphs of a generator beside the transformer: embeddings and guided sampling."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from tokenflow_export.language_model.sample_graph import sample

__all__ = ["EmbedImageGraph", "EmbedTextGraph", "SampleGraph"]


class EmbedTextGraph(nn.Module):
    """Embeds text: token_ids int32 [B, Q], starts float32 [B, Q] -> embeddings float32 [B, Q, H].

    `table` has a row for each text token, with the level embedding of text added; image tokens have none. `starts` is 1 at the
    image start token, to whose embedding the first image position is added, and 0 elsewhere.
    """

    table: Tensor
    first_position: Tensor

    def __init__(self, table: Tensor, first_position: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.register_buffer("first_position", first_position)

    def forward(self, token_ids: Tensor, starts: Tensor) -> Tensor:
        return F.embedding(token_ids, self.table).float() + starts[..., None] * self.first_position


class EmbedImageGraph(nn.Module):
    """Embeds a scale: features float32 [B, Q, C], level int32 [1], places int32 [Q] -> embeddings float32 [B, Q, H].

    An embedding is the projected feature plus the level embedding plus the embedding of the place among all codes.
    """

    levels: Tensor
    positions: Tensor

    def __init__(self, projector: nn.Module, levels: Tensor, positions: Tensor) -> None:
        super().__init__()
        self.projector = projector
        self.register_buffer("levels", levels)
        self.register_buffer("positions", positions)

    def forward(self, features: Tensor, level: Tensor, places: Tensor) -> Tensor:
        projected: Tensor = self.projector(features)
        return projected + (F.embedding(level, self.levels) + F.embedding(places, self.positions))


class SampleGraph(nn.Module):
    """Samples image codes with guidance, top-k and top-p, by inverse CDF (docs/model.md, section 4).

    `tokenflow_sdk.model.sampling` does the same in NumPy. Inputs: conditional and unconditional hidden states [R, Q, H];
    guidance and top_p float32 [R]; top_k int32 [R]; noise float32 [R, Q]; ranks int32 [W], the numbers 0 .. W - 1. Only the W
    likeliest codes are sorted, so W must be at least every top_k. Outputs: code_indices int32 [R, Q]; certain int32 [R], as
    `sample` gives it; logits float32 [R, Q, K]. The head has no bias, so guidance is applied to the hidden states, which
    takes one product with the head instead of two.
    """

    head: Tensor

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
    ) -> tuple[Tensor, Tensor, Tensor]:
        t = guidance[:, None, None]
        guided = (1 + t) * conditional - t * unconditional
        logits = F.linear(guided.to(self.head.dtype), self.head).float()
        return *sample(logits, top_k, top_p, noise, ranks), logits
