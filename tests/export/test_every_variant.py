"""Released sizes, stand-in weights: every other variant the whole way."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.export.test_full_size import build_for_tensorrt_rtx
from tests.support.cpu_graphs import operators, rewritten
from tests.support.mini import export_mini
from tokenflow_export.checkpoints.standin import standin_arrays
from tokenflow_export.checkpoints.tokenizer import load_model
from tokenflow_export.models.config import VARIANTS
from tokenflow_export.tokenizer import export
from tokenflow_export.tokenizer.reference_images import reference_pictures
from tokenflow_sdk import Tokenizer
from tokenflow_sdk.parity.tokenizer import check_tokenizer
from tokenflow_sdk.pictures.images import psnr


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["clipb_224", "vitamin_256", "siglip_384"])
def test_every_variant_goes_the_same_way(
    variant: str, tmp_path: Path, figure: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The export checks itself; the runtime then repeats the check from the files alone, on a photo's crop as well.

    A picture of the reference and a crop are two: a third takes a minute, and goes the same way.
    """
    monkeypatch.setattr(export, "reference_pictures", partial(reference_pictures, count=1))
    config = VARIANTS[variant]
    state = {key: torch.from_numpy(array) for key, array in standin_arrays(config)}
    model = load_model(state, config)
    bundle = export_mini(model, tmp_path / variant)
    with Tokenizer.from_pretrained(bundle) as tokenizer, torch.inference_mode():
        report = check_tokenizer(tokenizer.graphs)
        assert report.failures() == []
        photo = tokenizer.preprocess(ROOT / "examples" / "chelsea.jpg")
        codes, _ = model.encode(torch.from_numpy(photo)[None])
        found = tokenizer.encode_array(photo[None])[0]
        assert (found == codes[0].numpy()).mean() > 0.99
        assert psnr(tokenizer.decode_array(codes.int().numpy())[0], model.decode(codes)[0].numpy()) >= 55
    # Its large convolutions are known by the sizes that the exporter writes into the graph.
    assert operators(rewritten(bundle / "decode.onnx"))["SpaceToDepth"] > 0
    assert operators(rewritten(bundle / "encode.onnx"))["SpaceToDepth"] == 0
    if variant == "siglip_384":
        build_for_tensorrt_rtx(bundle, figure)
