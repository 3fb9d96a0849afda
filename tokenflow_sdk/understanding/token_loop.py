"""Answering token by token over the paged cache (docs/model.md, section 5): the loop's arithmetic, without queues or threads.

A request is one question and its answer. Its prompt is run in pieces of any length, then each step adds one token to every
answer that it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Literal

import numpy as np

from tokenflow_sdk.backends.session import Session, Tensor
from tokenflow_sdk.bundle.model_config import UnderstanderConfig
from tokenflow_sdk.model.kv_cache import PageTable
from tokenflow_sdk.model.sampling import TIES, uniform
from tokenflow_sdk.model.transformer import PagedTransformer
from tokenflow_sdk.understanding.params import AnswerParams
from tokenflow_sdk.understanding.prompt import Block, ImageBlock, TokenPrompt, split_blocks

__all__ = ["AnswerRequest", "TokenLoop"]


@dataclass(eq=False)
class AnswerRequest:
    """One question and its answer. `table` exists from its first step to its last."""

    prompt: TokenPrompt
    params: AnswerParams
    keep: bool
    """Whether the pages stay afterwards, for a next question of the same conversation."""
    began: float
    """When it was asked, in seconds of `perf_counter`."""
    table: PageTable | None = None
    pending: list[Block] | None = None
    """What of the prompt is still to run; None before and after."""
    tokens: list[int] = field(default_factory=list)
    timings: list[float] = field(default_factory=list)
    """Seconds from the beginning to each token, and to the one that ended it."""
    cached: int = 0
    """Tokens of the prompt whose pages were there already."""
    finish: Literal["stop", "length"] | None = None
    error: BaseException | None = None
    """Why it cannot go on: a step that it shared failed."""

    def reached(self, count: int) -> bool:
        """Whether it has `count` tokens, or is finished with fewer."""
        return self.finish is not None or len(self.tokens) >= count

    @property
    def unread(self) -> int:
        """Tokens in `pending`."""
        return sum(map(len, self.pending or ()))

    @property
    def most_stored(self) -> int:
        """Tokens in the pages by the end of the answer at most: its last one is never run."""
        return len(self.prompt) + self.params.max_tokens - 1

    @property
    def history(self) -> TokenPrompt:
        """Prompt and answer as the pages hold them once it is finished."""
        return self.prompt.followed_by(self.tokens if self.finish == "stop" else self.tokens[:-1], shared=True)


class TokenLoop:
    """The loop over one model.

    Args:
        config: sizes.
        sessions: `embed_text`, `project` and `head`.
        transformer: the paged transformer.
    """

    def __init__(self, config: UnderstanderConfig, sessions: Mapping[str, Session], transformer: PagedTransformer) -> None:
        self.config = config
        self.transformer = transformer
        self._sessions = sessions

    def begin(self, request: AnswerRequest, table: PageTable) -> None:
        """Go on after what `table` holds of the prompt already."""
        request.table, request.cached = table, table.length
        request.pending = split_blocks(request.prompt.blocks, table.length)[1]

    def prefill(self, request: AnswerRequest, count: int) -> None:
        """Run the next `count` tokens of the prompt; after its last, draw the first token of the answer.

        Raises:
            PagesExhausted: the pool has too few free pages; the request must then be given up.
        """
        assert request.table is not None and request.pending is not None
        blocks, request.pending = split_blocks(request.pending, count)
        hidden = self._step(self._embed(blocks), [request.table])
        if not request.pending:
            request.pending = None
            self._draw([request], hidden[-1:])

    def decode(self, requests: Sequence[AnswerRequest]) -> None:
        """One more token for each answer.

        Raises:
            PagesExhausted: the pool has too few free pages; the requests must then be given up.
        """
        ids = np.asarray([[request.tokens[-1]] for request in requests], np.int32)
        embeddings = self._sessions["embed_text"].run_resident({"token_ids": ids})["embeddings"]
        self._draw(requests, self._step(embeddings, [request.table for request in requests if request.table is not None]))

    def _embed(self, blocks: Sequence[Block]) -> Tensor:
        """Embeddings [1, Q, H] of a piece of a prompt: of one block where its graph left them, of several on the host."""
        if len(blocks) == 1:
            return self._embed_block(blocks[0])
        # Copied one by one: two texts come out of the same graph.
        return np.concatenate([np.array(self._embed_block(block)) for block in blocks], axis=1)

    def _embed_block(self, block: Block) -> Tensor:
        if isinstance(block, ImageBlock):
            return self._sessions["project"].run_resident({"features": block.features[None]})["embeddings"]
        return self._sessions["embed_text"].run_resident({"token_ids": np.asarray([block], np.int32)})["embeddings"]

    def _step(self, embeddings: Tensor, tables: Sequence[PageTable]) -> Tensor:
        """Embeddings [B, Q, H] after what the tables hold -> hidden states [B * Q, H], where the graph left them; stored."""
        batch, length, width = embeddings.shape
        context = [table.length for table in tables]
        own = np.arange(length, dtype=np.int32)
        output = self.transformer.step(
            embeddings,
            np.asarray(context, np.int32)[:, None] + own,
            np.broadcast_to(own + np.int32(1), (batch, length)).copy(),
            tables,
            context,
            width=max(1, *(len(table.pages) for table in tables)),
        )
        self.transformer.store(output, tables)
        return output.hidden.reshape(batch * length, width)

    def _draw(self, requests: Sequence[AnswerRequest], hidden: Tensor) -> None:
        """The next token of each answer from hidden states [B, H]."""
        params = [request.params for request in requests]
        # A penalty falls on the answer's own tokens; rows are filled up with one of them.
        seen = [list(dict.fromkeys(t.tokens)) if t.tokens and t.params.repetition_penalty != 1 else [0] for t in requests]
        longest = max(map(len, seen))
        top_k = [1 if p.greedy else min(p.top_k, self.config.vocabulary) for p in params]
        feeds: dict[str, Tensor] = {
            "hidden": hidden,
            "seen": np.asarray([ids + ids[:1] * (longest - len(ids)) for ids in seen], np.int32),
            "penalty": np.asarray([t.params.repetition_penalty if t.tokens else 1 for t in requests], np.float32),
            "temperature": np.asarray([1 if p.greedy else p.temperature for p in params], np.float32),
            "top_k": np.asarray(top_k, np.int32),
            "top_p": np.asarray([p.top_p for p in params], np.float32),
            "noise": np.asarray([uniform(t.params.seed, 0, len(t.tokens), 0, 1)[0] for t in requests], np.float32),
            "ranks": np.arange(min(max(top_k) + TIES, self.config.vocabulary), dtype=np.int32),
        }
        found = self._sessions["head"].run(feeds, ["token_ids"])["token_ids"]
        for request, token in zip(requests, found.tolist(), strict=True):
            self._accept(request, token)

    def _accept(self, request: AnswerRequest, token: int) -> None:
        request.timings.append(perf_counter() - request.began)
        if token in (self.config.stop_ids if request.params.stop_ids is None else request.params.stop_ids):
            request.finish = "stop"
            return
        request.tokens.append(token)
        if len(request.tokens) == request.params.max_tokens:
            request.finish = "length"
