"""Train the bundled tokenizer.

    python -m recipes.tiny.train_tokenizer --data data/tiny --out data/tiny/tokenizer

Resumes from the checkpoint in --out. Every 250 steps, figures on held-out pictures are added to curve.jsonl there and
plotted in curve.png, and samples.jpg shows reconstructions. best.pt is the checkpoint with the highest PSNR on held-out
photographs.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from recipes.tiny.config import TINY
from recipes.tiny.data import Pictures, Pixels, to_tensor
from recipes.tiny.initial import initialise
from recipes.tiny.loop import AveragedTraining, best_average, cooled, device, has_bfloat16, run, training_parser
from recipes.tiny.quantizer import TrainingQuantizer
from recipes.tiny.teacher import Teacher
from tokenflow_export.models.tokenizer import TokenFlowTokenizer
from tokenflow_sdk.pictures.contact_sheet import contact_sheet
from tokenflow_sdk.pictures.images import psnr

__all__ = ["TokenizerTraining", "load_tokenizer", "main", "pixel_loss", "thumbnail_psnr"]

SAMPLES = "samples.jpg"

FIRST = 256
"""Pictures that the weights are initialised with."""
WARM_UP = 150
"""Steps without quantization, after which the codebooks are initialised; none with the weights of another training."""
RESTART_EVERY = 100
FEWER_SCALES = 0.1
"""Share of steps that use the coarser scales only, so that these decode to a picture too."""


def load_tokenizer(directory: Path) -> TokenFlowTokenizer:
    """Load the averaged tokenizer of a training's best checkpoint, with its weights rounded to float16, as it is bundled."""
    model = TokenFlowTokenizer(TINY)
    model.load_state_dict({key: value.half().float() for key, value in best_average(directory).items()})
    return model.eval().requires_grad_(False)


class TokenizerTraining(AveragedTraining[TokenFlowTokenizer]):
    """The training of the tokenizer: model, average, optimizer and step, which a checkpoint keeps, and the data."""

    def __init__(
        self, pictures: Pictures, steps: int, batch: int, rate: float, seed: int, perceptual: float, device: torch.device
    ) -> None:
        torch.manual_seed(seed)
        self.perceptual, self.warm_up = perceptual, WARM_UP
        self.pictures, self.steps, self.batch, self.rate, self.seed, self.device = pictures, steps, batch, rate, seed, device
        first = to_tensor(pictures.batch(FIRST, seed, 2**31), torch.device("cpu"))
        model = TokenFlowTokenizer(TINY)
        initialise(model, first)
        self.half = has_bfloat16(device)
        model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
        super().__init__(model, optimizer, decay=0.999)
        self.teacher = Teacher().to(device)
        with torch.no_grad():
            self.teacher.calibrate(first[:64].to(device))
        self.quantizer = TrainingQuantizer(TINY, device)
        self.used = torch.zeros(TINY.codebook_size, device=device)
        self.reader = ThreadPoolExecutor(1)
        self.ahead: dict[int, Future[list[Pixels]]] = {}

    def run_step(self) -> dict[str, float]:
        """Run one optimizer step, and return the losses."""
        x = to_tensor(self._pictures(), self.device)
        if 0 < self.step == self.warm_up:
            self._initialise_codes()
        scales = self._scales()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            latent = self._latent(x)
            losses = self._losses(x, latent.float(), scales)
        self.descend(torch.stack(list(losses.values())).sum(), self.rate * cooled(self.step, self.steps))
        return {name: float(value.detach()) for name, value in losses.items()}

    def _scales(self) -> int | None:
        """The number of coarse scales that this step uses; None: all."""
        rng = np.random.default_rng([self.seed, self.step, 1])
        return int(rng.integers(1, len(TINY.patch_nums))) if rng.random() < FEWER_SCALES else None

    def _pictures(self) -> list[Pixels]:
        """The pictures of this step. Those of the next are read meanwhile."""

        def read(step: int) -> Future[list[Pixels]]:
            return self.reader.submit(self.pictures.batch, self.batch, self.seed, step)

        now = self.ahead.get(self.step) or read(self.step)
        self.ahead = {self.step + 1: read(self.step + 1)}
        return now.result()

    def _latent(self, x: Tensor) -> Tensor:
        semantic = self.model.semantic_branch(x)
        pixel = self.model.pixel_branch(x).flatten(2).transpose(1, 2)
        return torch.cat([semantic, pixel], dim=-1)

    def _losses(self, x: Tensor, latent: Tensor, scales: int | None) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        features = latent
        if self.step >= self.warm_up:
            with torch.autocast(self.device.type, enabled=False):
                quantized = self.quantizer(self.model, latent, scales)
            features, losses["codes"] = quantized.features, quantized.loss
            self._count(quantized.indices, quantized.cells)
        else:
            losses["codes"] = 0.01 * latent.square().mean()
        maps = torch.unflatten(features.transpose(1, 2), 2, (TINY.grid, TINY.grid))
        semantic, pixel = torch.split(maps, [TINY.semantic_dim, TINY.pixel_dim], dim=1)
        y = self.model.decoder(self.model.post_quant_conv(pixel)).float()
        losses["pixels"] = pixel_loss(y, x)
        semantic_features = self.model.decode_task_layer(self.model.decoder_vqkd(semantic)).float()
        with torch.no_grad():
            target = self.teacher(x)
        losses["semantic"] = 0.25 * F.mse_loss(semantic_features, target)
        if self.perceptual:
            losses["perceptual"] = self.perceptual * F.mse_loss(self.teacher(y), target)
        return losses

    def _count(self, indices: Tensor, cells: Tensor) -> None:
        """Count how often codes are used, and at times replace those that are hardly used by cells of this step."""
        self.used += torch.bincount(indices.flatten(), minlength=len(self.used))
        if self.step % RESTART_EVERY == 0 and self.step > self.warm_up:
            dead = torch.nonzero(self.used < 0.05 * self.used.mean())[:, 0]
            if len(dead) and self.step < 0.8 * self.steps:
                pick = torch.randperm(len(cells), device=cells.device)[: len(dead)]
                self.quantizer.set_codes(self.model, dead[: len(pick)], cells[pick])
            self.used.zero_()

    @torch.no_grad()
    def _initialise_codes(self) -> None:
        """Put residual cells of four batches into the codebooks."""
        cells = []
        for i in range(4):
            x = to_tensor(self.pictures.batch(16, self.seed, 2**31 + 1 + i), self.device)
            cells.append(self.quantizer.ideal_cells(self._latent(x)))
        every = torch.cat(cells)
        pick = torch.randperm(len(every), device=self.device)[: TINY.codebook_size]
        self.quantizer.set_codes(self.model, torch.arange(TINY.codebook_size, device=self.device), every[pick])
        self.average.quantize.load_state_dict(self.model.quantize.state_dict())

    @torch.no_grad()
    def evaluate(self, out: Path) -> dict[str, float]:
        """The PSNR of held-out photographs, those of other authors, and drawings, and the share of codes used."""
        model = self.average.eval()
        figures: dict[str, float] = {}
        used: set[int] = set()
        originals, decoded = [], []
        for name, group in self.pictures.held_out().items():
            found = []
            for picture in group:
                codes, _ = model.quantize.encode(model.latent(to_tensor([picture], self.device)))
                used |= set(codes.flatten().tolist())
                decoded.append(model.decode(codes)[0].cpu().numpy())
                found.append(psnr(decoded[-1], picture))
            originals += group
            figures[name] = float(np.mean(found))
        self._write_samples(originals, decoded, out)
        return figures | {"codes_used": len(used) / TINY.codebook_size}

    def _write_samples(self, originals: list[Pixels], decoded: list[Pixels], out: Path) -> None:
        """Write a sheet of pictures, each above its reconstruction."""
        tiles: list[tuple[Image.Image, str]] = []
        for start in range(0, len(originals), 12):
            for name, group in (("original", originals), (f"step {self.step}", decoded)):
                tiles += [(Image.fromarray(picture).resize((160, 160)), name) for picture in group[start : start + 12]]
        partial = out / f"partial-{SAMPLES}"
        contact_sheet(tiles, 12).save(partial, quality=88)
        partial.replace(out / SAMPLES)

    def score(self, figures: dict[str, float]) -> float:
        return figures["photos"]

    def begin(self, weights: Mapping[str, Tensor]) -> None:
        super().begin(weights)
        self.warm_up = 0

    def state(self) -> dict[str, Any]:
        teacher = {"mean": self.teacher.mean, "std": self.teacher.std}
        return super().state() | {"teacher": teacher, "used": self.used, "warm_up": self.warm_up}

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self.teacher.mean, self.teacher.std = (state["teacher"][name].to(self.device) for name in ("mean", "std"))
        self.used = state["used"].to(self.device)
        self.warm_up = state["warm_up"]


def thumbnail_psnr(picture: Pixels) -> float:
    """The PSNR of a baseline: the picture reduced to 16 x 16 by area and enlarged by bicubic interpolation."""
    x = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
    small = F.interpolate(x, size=(16, 16), mode="area")
    large = F.interpolate(small, size=x.shape[-2:], mode="bicubic").round().clamp(0, 255)
    return psnr(large[0].permute(1, 2, 0).byte().numpy(), picture)


def pixel_loss(y: Tensor, x: Tensor) -> Tensor:
    """How far pictures y are from x, both [B, 3, H, W]: squared, absolute, and of image gradients, which keeps edges sharp."""
    difference = y - x
    gradients = difference.diff(dim=2).abs().mean() + difference.diff(dim=3).abs().mean()
    return 5 * difference.square().mean() + 0.5 * difference.abs().mean() + 0.5 * gradients


def main(argv: list[str] | None = None) -> int:
    parser = training_parser(__doc__, out=Path("data/tiny/tokenizer"), steps=70000, batch=4, rate=8e-4)
    parser.add_argument("--perceptual", type=float, default=0.0, help="weight of the teacher's features (default: %(default)s)")
    a = parser.parse_args(argv)
    torch.set_num_threads(a.threads)
    run(TokenizerTraining(Pictures(a.data), a.steps, a.batch, a.rate, a.seed, a.perceptual, device()), a.out, a.start)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
