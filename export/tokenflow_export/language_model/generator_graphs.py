"""The generator's own graphs, beside the transformer: embeddings and guided sampling."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from tokenflow_export.language_model.sample_graph import sample

__all__ = ["EmbedImageGraph", "EmbedTextGraph", "SampleGraph"]


class EmbedTextGraph(nn.Module):
    """token_ids int32 [B, Q], starts float32 [B, Q] -> embeddings [B, Q, H].

    Ids count rows of `table`, which has the text's level embedding added and leaves the image tokens out. `starts` is 1 at
    the image start token, which takes the first image position as well.
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
    """features float32 [B, Q, 40], level int32 [1], places int32 [Q] -> embeddings [B, Q, H]: projector + level + position."""

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
    """Guided top-k, top-p sampling of image codes by inverse CDF (docs/model.md, section 4); its twin is in
    `tokenflow_sdk.model.sampling`.

    Inputs: conditional and unconditional [R, Q, H]; guidance and top_p float32 [R]; top_k int32 [R]; noise float32 [R, Q];
    ranks int32 [W], the numbers 0 .. W - 1, W at least every top_k. Outputs: code_indices int32 [R, Q]; logits [R, Q, K].
    Only the W likeliest are sorted. The head has no bias, so guidance is applied to its input: one product, not two.
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
    ) -> tuple[Tensor, Tensor]:
        t = guidance[:, None, None]
        guided = (1 + t) * conditional - t * unconditional
        logits = F.linear(guided.to(self.head.dtype), self.head).float()
        return sample(logits, top_k, top_p, noise, ranks), logits
