"""Generates the pictures of a bundle's reference, so that the exporter need not ship photos."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["reference_pictures"]


def reference_pictures(size: int, count: int = 4) -> NDArray[np.uint8]:
    """Pictures u8 [count, size, size, 3] with textures like those of photos (1/f noise), sharp edges and smooth gradients."""
    return np.stack([_picture(size, np.random.Generator(np.random.PCG64(seed))) for seed in range(count)])


def _picture(size: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    y, x = np.mgrid[0:size, 0:size] / size
    canvas: NDArray[np.float64] = (
        rng.uniform(0.2, 0.8, 3) + _texture(size, rng) + (x[..., None] - 0.5) * rng.uniform(-0.5, 0.5, 3)
    )
    for _ in range(6):
        centre_x, centre_y, radius = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.9), rng.uniform(0.05, 0.25)
        dx, dy = np.abs(x - centre_x), np.abs(y - centre_y)
        inside = dx * dx + dy * dy < radius * radius if rng.random() < 0.5 else np.maximum(dx, dy) < radius
        canvas[inside] = 0.6 * rng.uniform(0, 1, 3) + 0.4 * canvas[inside]
    return np.round(np.clip(canvas, 0, 1) * 255).astype(np.uint8)


def _texture(size: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Coloured noise [size, size, 3] whose amplitude falls with frequency, as in photographs."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None]) * size
    spectrum = np.fft.fft2(rng.standard_normal((size, size, 3)), axes=(0, 1)) / np.maximum(frequency, 1)[..., None] ** 1.2
    noise: NDArray[np.float64] = np.fft.ifft2(spectrum, axes=(0, 1)).real
    return 0.2 * noise / float(noise.std())
