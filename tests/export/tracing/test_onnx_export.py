from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tokenflow_export.tracing.onnx_export import GraphSpec, export_graph
from tokenflow_sdk.errors import ArgumentError


class _Failing(nn.Module):
    """Says in its error whether garbage is collected while it is traced."""

    def forward(self, x: Tensor) -> Tensor:
        raise ArgumentError(f"collects garbage: {gc.isenabled()}", "-")


@pytest.mark.parametrize("collects", [True, False])
def test_garbage_is_collected_after_tracing_if_it_was_before(collects: bool, tmp_path: Path) -> None:
    was = gc.isenabled()
    try:
        gc.enable() if collects else gc.disable()
        with pytest.raises(ArgumentError, match="collects garbage: False"):
            export_graph(GraphSpec("failing", _Failing(), {"x": (torch.zeros(2), {})}, ("y",)), tmp_path)
        assert gc.isenabled() == collects
    finally:
        gc.enable() if was else gc.disable()
