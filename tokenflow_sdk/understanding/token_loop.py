"""The next-token loop: prefills prompts and decodes answers over paged keys and values (docs/model.md, section 5).

Arithmetic only, without queues or threads. A prompt is prefilled in chunks of any length; then each step adds one token to
every answer that it is given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Literal

import numpy as np

from tokenflow_sdk.backends.session import Session, Tensor
from tokenflow_sdk.bundle.model_config import UnderstanderConfig
from tokenflow_sdk.loaded_model import Progress
from tokenflow_sdk.model.kv_cache import PageTable
from tokenflow_sdk.model.sampling import TIES, run_sampling, uniform
from tokenflow_sdk.model.transformer import PagedTransformer, filled_up, not_finite
from tokenflow_sdk.understanding.params import DEFAULT_MAX_TOKENS, AnswerParams, sample_token
from tokenflow_sdk.understanding.prompt import Block, ImageBlock, TokenPrompt, split_blocks

__all__ = ["AnswerRequest", "TokenLoop"]


@dataclass(eq=False)
class AnswerRequest:
    """One question and its answer. `table`, its block table, exists from its first step to its last."""

    prompt: TokenPrompt
    params: AnswerParams
    keep: bool
    """Whether its pages go to the prefix cache afterwards, for a next question of the same conversation."""
    began: float
    """When it was asked, in seconds of `perf_counter`."""
    table: PageTable | None = None
    pending: list[Block] | None = None
    """Blocks of the prompt that are still to be prefilled; None before and after prefilling."""
    tokens: list[int] = field(default_factory=list)
    timings: list[float] = field(default_factory=list)
    """Seconds from `began` to each token, and to the stop token."""
    cached: int = 0
    """Tokens of the prompt whose pages came from the prefix cache."""
    finish: Literal["stop", "length"] | None = None
    progress: Progress = field(default_factory=Progress)
    error: BaseException | None = None
    """What a step for this request raised; it cannot go on."""

    def reached(self, count: int) -> bool:
        """Whether it has `count` tokens, or is finished with fewer."""
        # The last token is there before `finish` says so.
        return self.finish is not None or (count < self.limit and len(self.tokens) >= count)

    @property
    def unread(self) -> int:
        """Tokens in `pending`."""
        return sum(map(len, self.pending or ()))

    @property
    def limit(self) -> int:
        """Most tokens of the answer."""
        return DEFAULT_MAX_TOKENS if self.params.max_tokens is None else self.params.max_tokens

    @property
    def most_stored(self) -> int:
        """Tokens in its pages at the end at most. The last token of an answer is never run, so it is not stored."""
        return len(self.prompt) + self.limit - 1

    @property
    def history(self) -> TokenPrompt:
        """Prompt and answer as the pages hold them once the answer is finished."""
        return self.prompt.followed_by(self.tokens if self.finish == "stop" else self.tokens[:-1], shared=True)


class TokenLoop:
    """Runs the graphs of one understander.

    Args:
        config: sizes of the model.
        sessions: its graphs `embed_text`, `project` and `head`.
        transformer: the paged transformer.
    """

    def __init__(self, config: UnderstanderConfig, sessions: Mapping[str, Session], transformer: PagedTransformer) -> None:
        self.config = config
        self.transformer = transformer
        self._sessions = sessions

    def begin(self, request: AnswerRequest, table: PageTable) -> None:
        """Start a request whose table holds the first tokens of its prompt already, or none."""
        request.table, request.cached = table, table.length
        request.pending = split_blocks(request.prompt.blocks, table.length)[1]

    def prefill(self, request: AnswerRequest, count: int) -> None:
        """Prefill the next `count` tokens of the prompt; after the last of them, sample the answer's first token.

        Raises:
            PagesExhausted: the pool has too few free pages; the request must then be given up.
            NotFiniteError: the model computed NaN or infinity for it.
        """
        assert request.table is not None and request.pending is not None
        blocks, request.pending = split_blocks(request.pending, count)
        hidden = self._step(self._embed(blocks), [request])
        if not request.pending:
            request.pending = None
            self._sample([request], hidden[-1:])
        if request.error is not None:
            raise request.error

    def decode(self, requests: Sequence[AnswerRequest]) -> None:
        """Sample one more token of each answer. Requests whose numbers are not finite get an `error`, and cannot go on.

        Raises:
            PagesExhausted: the pool has too few free pages; the requests must then be given up.
        """
        rows = filled_up(requests, self.transformer.padded("batch", len(requests)))
        ids = np.asarray([[request.tokens[-1]] for request in rows], np.int32)
        embeddings = self._sessions["embed_text"].run_resident({"token_ids": ids})["embeddings"]
        self._sample(requests, self._step(embeddings, requests))

    def _embed(self, blocks: Sequence[Block]) -> Tensor:
        """Embeddings [1, Q, H] of a chunk, in the memory of the transformer's device."""
        if len(blocks) == 1:
            return self._embed_block(blocks[0])
        return self.transformer.joined(map(self._embed_block, blocks), sum(map(len, blocks)))

    def _embed_block(self, block: Block) -> Tensor:
        if isinstance(block, ImageBlock):
            return self._sessions["project"].run_resident({"features": block.features[None]})["embeddings"]
        return self._sessions["embed_text"].run_resident({"token_ids": np.asarray([block], np.int32)})["embeddings"]

    def _step(self, embeddings: Tensor, requests: Sequence[AnswerRequest]) -> Tensor:
        """Run embeddings [B, Q, H] after the tokens of each request, and store keys and values; hidden states [B * Q, H].

        Rows after the requests' are padding, the last one's again. Requests whose numbers are not finite get an `error`.
        """
        batch, length, width = embeddings.shape
        own_tables = [request.table for request in requests if request.table is not None]
        tables = filled_up(own_tables, batch)
        context = [table.length for table in tables]
        own = np.arange(length, dtype=np.int32)
        output = self.transformer.step(
            embeddings,
            np.asarray(context, np.int32)[:, None] + own,
            np.broadcast_to(own + np.int32(1), (batch, length)).copy(),
            tables,
            context,
            width=self.transformer.padded("table", max(1, *(len(table.pages) for table in tables))),
        )
        for request, stored in zip(requests, self.transformer.store(output, own_tables), strict=True):
            if not stored:
                request.error = not_finite()
        return output.hidden.reshape(batch * length, width)

    def _sample(self, requests: Sequence[AnswerRequest], hidden: Tensor) -> None:
        """Sample the next token of each answer from hidden states [B, H], of which those after the answers' are padding."""
        head = self._sessions["head"]
        rows = filled_up(requests, hidden.shape[0])
        params = [request.params for request in rows]
        # The repetition penalty is for the answer's own tokens. Shorter rows are filled with a token they have.
        seen = [list(dict.fromkeys(t.tokens)) if t.tokens and t.params.repetition_penalty != 1 else [0] for t in rows]
        longest = head.padded("seen", max(map(len, seen)))
        top_p = [0 if p.greedy else p.top_p for p in params]
        top_k = [1 if p.greedy else min(p.top_k, self.config.vocabulary) for p in params]
        window = head.padded("window", min(max(top_k) + TIES, self.config.vocabulary))
        feeds: dict[str, Tensor] = {
            "hidden": hidden,
            "seen": np.asarray([ids + ids[:1] * (longest - len(ids)) for ids in seen], np.int32),
            "penalty": np.asarray([t.params.repetition_penalty if t.tokens else 1 for t in rows], np.float32),
            "temperature": np.asarray([1 if p.greedy else p.temperature for p in params], np.float32),
            "top_k": np.asarray(top_k, np.int32),
            "top_p": np.asarray(top_p, np.float32),
            "noise": np.asarray(
                [0 if t.params.greedy else uniform(t.params.seed, 0, len(t.tokens), 0, 1)[0] for t in rows], np.float32
            ),
            "ranks": np.arange(window, dtype=np.int32),
        }
        found, logits = run_sampling(head, feeds, "token_ids")
        for row, request in enumerate(requests):
            token = int(found[row])
            if logits is not None and not np.isfinite(logits[row]).all():
                request.error = not_finite()
            elif logits is not None and top_p[row] == 0:
                token = sample_token(logits[row], replace(request.params, temperature=0), request.tokens, 0)
            if request.error is None:
                self._accept(request, token)

    def _accept(self, request: AnswerRequest, token: int) -> None:
        request.timings.append(perf_counter() - request.began)
        if token in (self.config.stop_ids if request.params.stop_ids is None else request.params.stop_ids):
            request.finish = "stop"
            return
        request.tokens.append(token)
        if len(request.tokens) == request.limit:
            request.finish = "length"
