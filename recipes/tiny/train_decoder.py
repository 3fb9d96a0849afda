"""Train the pixel decoder of the bundled tokenizer further, alone.

    python -m recipes.tiny.train_decoder --start data/tiny/tokenizer --data data/tiny --out data/tiny/decoder

Codes stay as they are, so the models that read or draw them stay right, and a decoder that need not follow a moving
codebook gets better in few steps. It begins with the best checkpoint in --start; export its own with
`python -m recipes.tiny.export --tokenizer data/tiny/decoder`. Resumes from the checkpoint in --out.
"""

from __future__ import annotations

from pathlib import Path

import torch

from recipes.tiny.config import TINY
from recipes.tiny.data import Pictures, to_tensor
from recipes.tiny.loop import cooled, device, run, training_parser
from recipes.tiny.optimizers import KernelMuon, Optimizers
from recipes.tiny.train_tokenizer import TokenizerTraining, pixel_loss

__all__ = ["DecoderTraining", "main"]


class DecoderTraining(TokenizerTraining):
    """A training of `decoder` and `post_quant_conv`; all other weights stay those that it begins with.

    Args:
        pictures, steps, batch, rate, seed, device: as of `TokenizerTraining`.
    """

    def __init__(
        self,
        pictures: Pictures,
        steps: int,
        batch: int,
        rate: float,
        seed: int,
        device: torch.device,
    ) -> None:
        super().__init__(pictures, steps, batch, rate, seed, perceptual=0.0, device=device)
        self.decay = 0.99
        self.model.requires_grad_(False)
        trained = [*self.model.post_quant_conv.parameters(), *self.model.decoder.parameters()]
        for weight in trained:
            weight.requires_grad_(True)
        kernels, others = ([weight for weight in trained if (weight.ndim == 4) == four] for four in (True, False))
        self.optimizer = Optimizers([KernelMuon(kernels, rate), torch.optim.AdamW(others, rate, (0.9, 0.95))])

    def run_step(self) -> dict[str, float]:
        """Run one optimizer step, and return the losses."""
        x = to_tensor(self._pictures(), self.device)
        count = sum(side * side for side in TINY.patch_nums[: self._scales()])
        with torch.no_grad():
            codes, _ = self.model.quantize.encode(self.model.latent(x))
            features = self.model.quantize.decode(codes[:, :count])
            pixel = features[:, TINY.semantic_dim :]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            y = self.model.decoder(self.model.post_quant_conv(pixel)).float()
        loss = pixel_loss(y, x)
        self.descend(loss, self.rate * cooled(self.step, self.steps))
        return {"pixels": float(loss.detach())}


def main(argv: list[str] | None = None) -> int:
    parser = training_parser(__doc__, out=Path("data/tiny/decoder"), steps=5000, batch=16, rate=1.2e-3)
    parser.set_defaults(start="data/tiny/tokenizer")
    a = parser.parse_args(argv)
    torch.set_num_threads(a.threads)
    run(DecoderTraining(Pictures(a.data), a.steps, a.batch, a.rate, a.seed, device()), a.out, a.start)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
