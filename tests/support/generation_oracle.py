"""Text to image the way upstream runs it: pads, the whole sequence and the whole head at every pass, no cache."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

import numpy as np
import torch
from torch.nn import functional as F

from tokenflow_export.checkpoints.architecture import read_architecture
from tokenflow_export.checkpoints.hf_directory import HfDirectory
from tokenflow_export.models.llama import Transformer
from tokenflow_sdk.bundle.model_config import GeneratorConfig
from tokenflow_sdk.model.sampling import SamplingParams, guidance, sample, uniform


class UncachedGenerator:
    """Eager PyTorch; slow on purpose.

    `token_forwards` counts what it runs, pads included; `sampling_seconds` is what sampling in NumPy took, for benchmarks to
    leave out.
    """

    def __init__(self, checkpoint: HfDirectory, config: GeneratorConfig, codebook: np.ndarray, device: str = "cpu") -> None:
        self.config, self.device, self.codebook = config, device, torch.from_numpy(codebook).to(device)
        self.weights = {key: checkpoint.tensor(key).to(device) for key in checkpoint.shapes}
        with torch.device("meta"):
            self.transformer = Transformer(read_architecture(checkpoint, "output"))
        state = {key: self.weights[f"model.{key}"] for key in self.transformer.state_dict()}
        self.transformer.load_state_dict(state, assign=True)
        self.transformer.eval().requires_grad_(False)
        self.token_forwards = 0
        self.sampling_seconds = 0.0

    @torch.inference_mode()
    def generate(self, prompt: Sequence[int], negative: Sequence[int], params: SamplingParams, number: int = 0) -> np.ndarray:
        """Code indices int32 [L] of one picture."""
        sides, codes, blocks = self.config.patch_nums, [], []
        f_hat = torch.zeros(self.codebook.shape[1], 1, 1, device=self.device)
        for scale, side in enumerate(sides):
            if scale:
                f_hat = self._resize(f_hat + self._rows(codes[-1], sides[scale - 1]), side)
            row, inputs = None, None
            for refinement, step in enumerate(params.passes if scale else params.passes[:1]):
                if scale:
                    inputs = self._embed(f_hat if row is None else f_hat + self._rows(row, side), scale)
                    blocks = [*blocks[: scale - 1], inputs]
                logits = self._guided(
                    prompt, negative, blocks, side * side, guidance(params.cfg_scale, scale, len(sides), params.unguided_scales)
                )
                noise = uniform(params.seed, number, scale, refinement, side * side)
                # A GPU has finished when its logits are here.
                values = logits.float().cpu().numpy()
                began = perf_counter()
                row = sample(values, step.top_k, step.top_p, noise)
                self.sampling_seconds += perf_counter() - began
                if refinement == 0:
                    first_inputs = inputs
            if scale:
                blocks[-1] = first_inputs
            codes.append(row)
        return np.concatenate(codes)

    def _guided(
        self, prompt: Sequence[int], negative: Sequence[int], blocks: list[torch.Tensor], count: int, t: float
    ) -> torch.Tensor:
        c, head = self.config, self.weights["lm_head.weight"]
        x, mask = zip(*(self._sequence(ids, blocks) for ids in (prompt, negative)), strict=True)
        positions = torch.arange(x[0].shape[0], device=self.device)[None].expand(2, -1)
        hidden = self.transformer(torch.stack(x), positions, torch.stack(mask))[:, -count:]
        self.token_forwards += 2 * x[0].shape[0]
        logits = F.linear(hidden.to(head.dtype), head)
        logits = (1 + t) * logits[0] - t * logits[1]
        return logits[:, c.image_token_start : c.image_token_start + c.codebook_size]

    def _sequence(self, ids: Sequence[int], blocks: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings and mask of pads, prompt, image start and blocks."""
        c, table, levels = self.config, self.weights["model.embed_tokens.weight"], self.weights["model.lvl_embed.weight"]
        tokens = [c.bos_id, *ids][: c.max_prompt]
        pads = c.max_prompt - len(tokens)
        row = torch.tensor([0] * pads + tokens + list(c.image_start_ids), device=self.device)
        text = F.embedding(row, table) + levels[0]
        text[-1] += self.weights["model.pos_1LC"][0]
        x = torch.cat([text, *blocks])
        mask = torch.ones(len(x), len(x), dtype=torch.bool, device=self.device).tril()
        start = len(text)
        for block in blocks:
            mask[start : start + len(block), start : start + len(block)] = True
            start += len(block)
        mask[:, :pads] = False
        mask[:pads, :pads] = torch.eye(pads, dtype=torch.bool, device=self.device)
        return x, mask

    def _embed(self, f_hat: torch.Tensor, scale: int) -> torch.Tensor:
        weights, place = self.weights, self.config.scales.starts[scale]
        x = f_hat.flatten(1).T
        for i in (0, 2):
            x = F.linear(x, weights[f"model.mm_projector.{i}.weight"], weights[f"model.mm_projector.{i}.bias"])
            x = F.gelu(x) if i == 0 else x
        return x + weights["model.lvl_embed.weight"][scale + 1] + weights["model.pos_1LC"][place : place + len(x)]

    def _rows(self, codes: np.ndarray, side: int) -> torch.Tensor:
        return self.codebook[torch.from_numpy(codes).long().to(self.device)].T.reshape(-1, side, side)

    @staticmethod
    def _resize(x: torch.Tensor, side: int) -> torch.Tensor:
        return F.interpolate(x[None], size=(side, side), mode="bicubic", align_corners=False)[0]
