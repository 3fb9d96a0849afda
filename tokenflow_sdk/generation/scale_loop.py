"""The next-scale loop: samples images scale by scale over paged keys and values (docs/model.md, section 4).

Arithmetic only, without requests or threads. An image has two rows, one after the prompt and one after the negative prompt;
without guidance, or where none is left, it has the first alone. At each scale they take one step over their pages. A refinement
pass is the same step again with other inputs; only the first pass's keys and values are stored, because only those are seen by
later scales. Between two passes an image may wait for others.
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
from tokenflow_sdk.model.transformer import PagedTransformer, StepOutput, filled_up, not_finite
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

    `number` counts the images of a request from 0; `conditional` and `unconditional` are its rows, of which the second is None
    where there is no guidance; `codes` has one array for each scale so far; `f_hat` float32 [C, s, s] is the sum of their
    codebook rows, resized to the next scale's side.
    """

    params: SamplingParams
    number: int
    conditional: Prefix
    unconditional: Prefix | None
    f_hat: Float32
    codes: list[Int32] = field(default_factory=list)
    error: NotFiniteError | None = None
    """Set by the step in which it cannot go on; other images can."""
    refinement: int = 0
    """Passes of the next scale that are done; `draft` is what the last of them sampled."""
    draft: Int32 | None = None

    @property
    def scale(self) -> int:
        """The scale to sample next, from 0."""
        return len(self.codes)

    @property
    def prefixes(self) -> list[Prefix]:
        """The rows: one or two."""
        return [self.conditional] if self.unconditional is None else [self.conditional, self.unconditional]

    @property
    def position(self) -> tuple[int, int]:
        """The scale and the pass of it to sample next, from 0."""
        return self.scale, self.refinement

    def release(self) -> None:
        """Free the pages of all rows."""
        for prefix in self.prefixes:
            prefix.table.release()


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
        # Attention is causal, so no token sees the padding behind it.
        length = self.transformer.padded("queries", total)
        rows = filled_up(rows, length)
        starts = np.zeros((1, length), np.float32)
        starts[0, total - 1] = 1
        feeds = {"token_ids": np.asarray([rows], np.int32), "starts": starts}
        embeddings = self._sessions["embed_text"].run_resident(feeds)["embeddings"]
        positions = np.arange(c.max_prompt - count, c.max_prompt - count + length, dtype=np.int32)[None]
        visible = np.arange(1, length + 1, dtype=np.int32)[None]
        table = PageTable(self.transformer.pool)
        output = self.transformer.step(embeddings, positions, visible, [table], [0], width=1)
        if not all(self.transformer.store(output, [table], count=total)):
            raise not_finite()
        hidden = output.hidden.reshape(length, c.width)[total - 1 : total]
        return Prefix(table, np.asarray(hidden, np.float32)[0].copy())

    def start(self, params: SamplingParams, number: int, conditional: Prefix, unconditional: Prefix | None) -> ImageState:
        """An image to sample, sharing the pages of its prefixes. Without `unconditional` it must be one without guidance."""
        forks = [prefix and Prefix(prefix.table.fork(), prefix.hidden) for prefix in (conditional, unconditional)]
        assert forks[0] is not None
        return ImageState(params, number, forks[0], forks[1], np.zeros((self._codebook.shape[1], 1, 1), np.float32))

    def sample_pass(self, images: Sequence[ImageState]) -> None:
        """Sample the next pass of images that are all at the same pass of the same scale; a scale's last pass gives its codes.

        Images that cannot go on get an `error`, and stay where they are.

        Args:
            images: of one or two rows each, all of them alike; at most as many rows as the transformer takes.

        Raises:
            PagesExhausted: the pool has too few free pages; the images must then be given up.
        """
        scale, refinement = images[0].position
        rows = len(images[0].prefixes)
        assert all((image.position, len(image.prefixes)) == ((scale, refinement), rows) for image in images)
        padded = filled_up(images, self.transformer.padded("batch", rows * len(images)) // rows)
        if scale == 0:
            hidden = np.stack([image.prefixes[row].hidden for row in range(rows) for image in padded])
            codes = self._sample(padded, hidden[: len(padded), None], hidden[-len(padded) :, None], 0)
        else:
            codes = self._sample_later_scale(padded, len(images), scale, refinement)
        for image, row in zip(images, codes, strict=False):
            if image.error is not None:
                continue
            if scale and refinement + 1 < len(image.params.passes):
                image.refinement, image.draft = refinement + 1, row
            else:
                self._finish_scale(image, row)

    def _sample_later_scale(self, images: Sequence[ImageState], count: int, scale: int, refinement: int) -> Int32:
        """Codes of images of which those after the first `count` are padding."""
        inputs = [image.f_hat if image.draft is None else image.f_hat + self._rows(image.draft, scale) for image in images]
        rows = len(images[0].prefixes)
        tables = [image.prefixes[row].table for row in range(rows) for image in images]
        last = scale + 1 == len(self.config.patch_nums)
        # A later pass does not see the keys that the first one stored for the scale itself.
        own = self.config.scales.counts[scale] if refinement and not last else 0
        output = self._step(np.stack(inputs), scale, tables, [table.length - own for table in tables])
        if not (refinement or last):
            own_rows = [row * len(images) + number for row in range(rows) for number in range(count)]
            stored = self.transformer.store(output, [tables[row] for row in own_rows], own_rows)
            for number, image in enumerate(images[:count]):
                if not all(stored[number::count]):
                    image.error = not_finite()
        # Without guidance both are the same rows, of which the first counts.
        start = (rows - 1) * len(images)
        return self._sample(images, output.hidden[: len(images)], output.hidden[start:], refinement)

    def _finish_scale(self, image: ImageState, row: Int32) -> None:
        scale = image.scale
        if scale + 1 < len(self.config.patch_nums):
            up = self._up[scale]
            image.f_hat = up @ (image.f_hat + self._rows(row, scale)) @ up.T
            if image.unconditional is not None and scale + 1 >= len(self.config.scales) - image.params.unguided_scales:
                image.unconditional.table.release()
                image.unconditional = None
        image.refinement, image.draft = 0, None
        # Last: other threads take the scale for sampled once its codes are here.
        image.codes.append(row)

    def _rows(self, codes: Int32, scale: int) -> Float32:
        """Codebook rows of one scale's codes [s * s] as a map [C, s, s]."""
        side = self.config.patch_nums[scale]
        rows: Float32 = self._codebook[codes].T.reshape(-1, side, side)
        return rows

    def _step(self, maps: Float32, scale: int, tables: Sequence[PageTable], context: Sequence[int]) -> StepOutput:
        """Run maps [R, C, s, s] in all rows of R images.

        Args:
            maps: the inputs of the scale.
            scale: its number, from 0.
            tables: of all conditional rows, then of all unconditional rows, if the images have these.
            context: tokens of each table that the step sees.
        """
        c, count = self.config, maps.shape[2] * maps.shape[3]
        places = np.arange(c.scales.starts[scale], c.scales.ends[scale], dtype=np.int32)
        features = np.ascontiguousarray(maps.reshape(len(maps), -1, count).transpose(0, 2, 1))
        rows = len(tables)
        feeds = {
            "features": np.concatenate([features] * (rows // len(maps))),
            "level": np.asarray([scale + 1], np.int32),
            "places": places,
        }
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
            "guidance": np.asarray(
                [guidance(each.cfg_scale, scale, len(self.config.scales), each.unguided_scales) for each in params], np.float32
            ),
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
