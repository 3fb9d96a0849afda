from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.fakes import fake_bundle
from tokenflow_sdk.dataset.job_options import JobOptions
from tokenflow_sdk.errors import ArgumentError

BUNDLE = replace(fake_bundle(), sha256="ab" * 32)


def test_options_that_cannot_work_are_named() -> None:
    with pytest.raises(ArgumentError, match="--also pixels is nothing that is stored"):
        JobOptions(also=("pixels",))
    for scales in (0, 3):
        with pytest.raises(ArgumentError, match=f"--scales {scales} is no number of scales of fake. Give 1 to 2."):
            JobOptions(scales=scales).complete(BUNDLE.config)
    assert JobOptions(also=("semantic", "features")) == JobOptions(also=("features", "semantic"))
    stamp = JobOptions(also=("semantic", "features"), scales=1).stamp(BUNDLE)
    assert (stamp.scales, stamp.shapes) == (1, {"features": (4, 40), "semantic": (4, 4)})
    assert (stamp.bundle_sha256, stamp.codebook_id) == ("ab" * 32, "ab" * 8)
