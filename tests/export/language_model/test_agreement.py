from __future__ import annotations

import numpy as np
import pytest
import torch

from tokenflow_export.language_model.agreement import Agreement, require_every_row
from tokenflow_export.tracing.weight_quantization import FULL_PRECISION, ExportPrecision
from tokenflow_sdk.errors import ParityError

HIDDEN, HEAD = torch.randn(12, 32, generator=torch.Generator().manual_seed(0)), torch.randn(32, 50)


def agreement(noise: float, logits_noise: float = 0.0) -> Agreement:
    found = HIDDEN + noise * torch.randn(12, 32, generator=torch.Generator().manual_seed(1))
    logits = found @ HEAD + logits_noise * torch.randn(12, 50, generator=torch.Generator().manual_seed(2))
    return Agreement.of(found, HIDDEN, logits, HIDDEN @ HEAD, "somebody")


@pytest.mark.parametrize(
    ("precision", "good", "bad"),
    [
        (FULL_PRECISION, 1e-4, 1e-3),
        (ExportPrecision("fp16"), 1e-2, 0.1),
        (ExportPrecision("fp32", "int8"), 0.1, 0.3),
        (ExportPrecision("fp16", "int4"), 0.5, 1.5),
    ],
    ids=str,
)
def test_each_precision_has_its_own_bar(precision: ExportPrecision, good: float, bad: float) -> None:
    agreement(good).require(precision)
    with pytest.raises(ParityError, match="graphs differ from somebody: hidden states by .* logits by"):
        agreement(bad).require(precision)


@pytest.mark.parametrize("precision", [FULL_PRECISION, ExportPrecision("fp16")], ids=str)
def test_a_head_that_differs_is_found_too(precision: ExportPrecision) -> None:
    with pytest.raises(ParityError):
        agreement(0.0, 1.0).require(precision)
    for nothing in (agreement(float("nan")), agreement(0.0, float("nan"))):
        with pytest.raises(ParityError):
            nothing.require(precision)


def test_every_row_of_a_table_is_compared() -> None:
    table = torch.randn(5000, 3).half()
    rows = table.float().numpy()
    require_every_row(lambda ids: rows[ids], table)
    spoilt = rows.copy()
    spoilt[4321, 1] += 1e-3
    with pytest.raises(ParityError, match="embeds token 4321 as another vector"):
        require_every_row(lambda ids: spoilt[ids], table)
    with pytest.raises(ParityError, match="token 0"):
        require_every_row(lambda ids: np.full((len(ids), 3), np.nan, np.float32), table)
