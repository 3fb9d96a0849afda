"""The graphs of an understander beside the transformer: token embeddings, and the head with sampling."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenflow_export.language_model.sample_graph import sample

__all__ = ["EmbedTokensGraph", "HeadGraph"]


class EmbedTokensGraph(nn.Module):
    """Embeds text: token_ids int32 [B, Q] -> embeddings float32 [B, Q, H]."""

    table: Tensor

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.table).float()


class HeadGraph(nn.Module):
    """Samples the next token of each row. `tokenflow_sdk.understanding.params.sample_token` does the same in NumPy.

    Inputs: hidden float32 [B, H]; seen int32 [B, S], the tokens to penalise, padded by repeating any of them; penalty,
    temperature, top_p and noise float32 [B]; top_k int32 [B]; ranks int32 [W], the numbers 0 .. W - 1, where W is at least
    every top_k. Outputs: token_ids int32 [B]; certain int32 [B], as `sample` gives it; logits float32 [B, V], before
    penalty and temperature.
    """

    def __init__(self, width: int, vocabulary: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.head = nn.Linear(width, vocabulary, bias=False, dtype=dtype)

    def forward(
        self,
        hidden: Tensor,
        seen: Tensor,
        penalty: Tensor,
        temperature: Tensor,
        top_k: Tensor,
        top_p: Tensor,
        noise: Tensor,
        ranks: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.head(hidden.to(self.head.weight.dtype)).float()
        rows, strength = seen.long(), penalty[:, None]
        found = logits.gather(-1, rows)
        found = torch.where(found < 0, found * strength, found / strength)
        tempered = logits.scatter(-1, rows, found) / temperature[:, None]
        token_ids, certain = sample(tempered[:, None], top_k, top_p, noise[:, None], ranks)
        return token_ids[:, 0], certain, logits
