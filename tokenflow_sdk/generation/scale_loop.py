"""The next-scale loop: samples images scale by scale over paged keys and values (docs/model.md, section 4).

Arithmetic only, without requests or threads. An image has two rows, one after the prompt and one after the negative prompt. At
each scale both take one step over their pages. A refinement pass is the same step again with other inputs; only the first
pass's keys and values are stored, because only those are seen by later scales.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from tokenflow_sdk.backends.session import Session, Tensor
from tokenflow_sdk.bundle.model_config import GeneratorConfig, pages_for
from tokenflow_sdk.errors import NotFiniteError
from tokenflow_sdk.model.kv_cache import PageTable
from tokenflow_sdk.model.sampling import TIES, SamplingParams, guidance, run_sampling, uniform
from tokenflow_sdk.model.transformer import PagedTransformer, StepOutput, not_finite
from tokenflow_sdk.pictures.resize import bicubic_matrix

__all__ = ["ImageState", "Prefix", "ScaleLoop"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class Prefix:
    """A prefilled prompt: its block table, and its last hidden state float32 [H], which predicts the first scale."""

    table: PageTable
    hidden: Float32


@dataclass
class ImageState:
    """One image being sampled.

    `number` counts the images of a request from 0; `conditional` and `unconditional` are its two rows; `codes` has one array
    for each scale so far; `f_hat` float32 [C, s, s] is the sum of their codebook rows, resized to the next scale's side.
    """

    params: SamplingParams
    number: int
    conditional: Prefix
    unconditional: Prefix
    f_hat: Float32
    codes: list[Int32] = field(default_factory=list)
    error: NotFiniteError | None = None
    """Set by the step in which it cannot go on; other images can."""

    @property
    def scale(self) -> int:
        """The scale to sample next, from 0."""
        return len(self.codes)

    def release(self) -> None:
        """Free the pages of both rows."""
        self.conditional.table.release()
        self.unconditional.table.release()


class ScaleLoop:
    """Runs the graphs of one generator.

    Args:
        config: sizes of the model.
        sessions: its graphs `embed_text`, `embed_image` and `sample`.
        transformer: the paged transformer.
        codebook: float32 [K, C], both halves of unit length.
    """

    def __init__(
        self, config: GeneratorConfig, sessions: Mapping[str, Session], transformer: PagedTransformer, codebook: Float32
    ) -> None:
        self.config = config
        self.transformer = transformer
        self._sessions = sessions
        self._codebook = codebook
        sides = config.patch_nums
        self._up = [bicubic_matrix(a, b).astype(np.float32) for a, b in pairwise(sides)]

    def prefill(self, prompt_ids: Sequence[int]) -> Prefix:
        """Run BOS, the prompt and the image start ids, and store their keys and values.

        Raises:
            PagesExhausted: the pool has too few free pages.
            NotFiniteError: the model computed NaN or infinity.
        """
        c = self.config
        ids = [c.bos_id, *prompt_ids][: c.max_prompt]
        count, total = len(ids), len(ids) + len(c.image_start_ids)
        rows = [i if i < c.image_token_start else i - c.codebook_size for i in (*ids, *c.image_start_ids)]
        starts = np.zeros((1, total), np.float32)
        starts[0, -1] = 1
        feeds = {"token_ids": np.asarray([rows], np.int32), "starts": starts}
        embeddings = self._sessions["embed_text"].run_resident(feeds)["embeddings"]
        positions = np.arange(c.max_prompt - count, c.max_prompt - count + total, dtype=np.int32)[None]
        visible = np.arange(1, total + 1, dtype=np.int32)[None]
        table = PageTable(self.transformer.pool)
        output = self.transformer.step(embeddings, positions, visible, [table], [0], width=1)
        if not all(self.transformer.store(output, [table])):
            raise not_finite()
        return Prefix(table, np.asarray(output.hidden, np.float32)[0, -1].copy())

    def start(self, params: SamplingParams, number: int, conditional: Prefix, unconditional: Prefix) -> ImageState:
        """An image to sample, sharing the pages of both prefixes."""
        forks = [Prefix(prefix.table.fork(), prefix.hidden) for prefix in (conditional, unconditional)]
        return ImageState(params, number, forks[0], forks[1], np.zeros((self._codebook.shape[1], 1, 1), np.float32))

    def sample_scale(self, images: Sequence[ImageState]) -> None:
        """Sample the next scale of images that are all at the same scale. Those that cannot go on get an `error` and no codes.

        Raises:
            PagesExhausted: the pool has too few free pages; the images must then be given up.
        """
        scale, most = images[0].scale, self.transformer.max_rows // 2
        assert all(image.scale == scale for image in images)
        if len(images) > most:
            self.sample_scale(images[:most])
            self.sample_scale(images[most:])
            return
        if scale == 0:
            conditional = np.stack([image.conditional.hidden for image in images])
            unconditional = np.stack([image.unconditional.hidden for image in images])
            codes = self._sample(images, conditional[:, None], unconditional[:, None], 0)
        else:
            codes = self._sample_later_scale(images, scale)
        for image, row in zip(images, codes, strict=True):
            if image.error is not None:
                continue
            total = image.f_hat + self._rows(row, scale)
            if scale + 1 < len(self.config.patch_nums):
                up = self._up[scale]
                image.f_hat = up @ total @ up.T
            image.codes.append(row)

    def _sample_later_scale(self, images: Sequence[ImageState], scale: int) -> Int32:
        inputs = np.stack([image.f_hat for image in images])
        tables = [image.conditional.table for image in images] + [image.unconditional.table for image in images]
        context = [table.length for table in tables]
        output = self._step(inputs, scale, tables, context)
        if scale + 1 < len(self.config.patch_nums):
            stored = self.transformer.store(output, tables)
            for row, image in enumerate(images):
                if not (stored[row] and stored[row + len(images)]):
                    image.error = not_finite()
        codes = self._sample(images, *_halves(output.hidden), 0)
        for refinement in range(1, max(len(image.params.passes) for image in images)):
            active = [i for i, image in enumerate(images) if refinement < len(image.params.passes)]
            refined = np.stack([inputs[i] + self._rows(codes[i], scale) for i in active])
            both = active + [i + len(images) for i in active]
            output = self._step(refined, scale, [tables[i] for i in both], [context[i] for i in both])
            codes[active] = self._sample([images[i] for i in active], *_halves(output.hidden), refinement)
        return codes

    def _rows(self, codes: Int32, scale: int) -> Float32:
        """Codebook rows of one scale's codes [s * s] as a map [C, s, s]."""
        side = self.config.patch_nums[scale]
        rows: Float32 = self._codebook[codes].T.reshape(-1, side, side)
        return rows

    def _step(self, maps: Float32, scale: int, tables: Sequence[PageTable], context: Sequence[int]) -> StepOutput:
        """Run maps [R, C, s, s] in both rows of R images.

        Args:
            maps: the inputs of the scale.
            scale: its number, from 0.
            tables: of all conditional rows, then of all unconditional rows.
            context: tokens of each table that the step sees.
        """
        c, count = self.config, maps.shape[2] * maps.shape[3]
        places = np.arange(c.scales.starts[scale], c.scales.ends[scale], dtype=np.int32)
        features = np.ascontiguousarray(maps.reshape(len(maps), -1, count).transpose(0, 2, 1))
        rows = 2 * len(maps)
        both = np.concatenate([features, features])
        feeds = {"features": both, "level": np.asarray([scale + 1], np.int32), "places": places}
        return self.transformer.step(
            self._sessions["embed_image"].run_resident(feeds)["embeddings"],
            np.broadcast_to(places + np.int32(c.prefix_length), (rows, count)).copy(),
            np.full((rows, count), count, np.int32),
            tables,
            context,
            # As wide as the longest prompt needs, whatever these prompts are: a batch must not change a row's sums.
            width=pages_for(c.prefix_length + c.scales.starts[scale], self.transformer.pool.page_size),
        )

    def _sample(self, images: Sequence[ImageState], conditional: Tensor, unconditional: Tensor, refinement: int) -> Int32:
        scale, count = images[0].scale, conditional.shape[1]
        params = [image.params for image in images]
        passes = [each.passes[refinement] for each in params]
        noise = [uniform(image.params.seed, image.number, scale, refinement, count) for image in images]
        feeds: dict[str, Tensor] = {
            "conditional": conditional,
            "unconditional": unconditional,
            "guidance": np.asarray([guidance(each.cfg_scale, scale, len(self.config.scales)) for each in params], np.float32),
            "top_k": np.asarray([min(step.top_k, self.config.codebook_size) for step in passes], np.int32),
            "top_p": np.asarray([step.top_p for step in passes], np.float32),
            "noise": np.stack(noise),
        }
        if conditional.shape[:2] == (1, 1):
            # One row alone would take another matrix kernel than the same row in a batch, which rounds differently.
            feeds = {name: np.concatenate([array, array]) for name, array in feeds.items()}
        window = min(max(min(step.top_k, self.config.codebook_size) for step in passes) + TIES, self.config.codebook_size)
        feeds["ranks"] = np.arange(window, dtype=np.int32)
        codes, logits = run_sampling(self._sessions["sample"], feeds, "code_indices")
        if logits is not None:
            for row, image in enumerate(images):
                if not np.isfinite(logits[row]).all():
                    image.error = not_finite()
                elif passes[row].top_p == 0:
                    codes[row] = logits[row].argmax(axis=-1)
        return codes[: len(images)]


def _halves(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states [2 R, Q, H] as those of the conditional and of the unconditional rows."""
    rows = hidden.shape[0] // 2
    return hidden[:rows], hidden[rows:]
