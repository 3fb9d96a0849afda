from __future__ import annotations

import numpy as np
import pytest

from tokenflow_sdk.errors import ArgumentError, ArrayError, CodesRangeError
from tokenflow_sdk.pictures.scales import Scales
from tokenflow_sdk.pictures.vocabulary import Vocabulary

SCALES = Scales((1, 2))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"offset": -1}, "offset=-1 is no id"),
        ({"offset": 1.5}, r"offset=1\.5 is no id"),
        ({"offset": 2**63}, "is no id"),
        ({"offset": 10, "image_start": True}, "image_start=True is no id"),
        ({"offset": 10, "image_end": 10}, r"image_end=10 is the id of a code. Codes are 10 \.\. 13"),
        ({"offset": 10, "scale_end": 13}, "scale_end=13 is the id of a code"),
        ({"offset": 10, "image_start": 3, "image_end": np.int64(3)}, "image_end=3 is image_start too"),
    ],
)
def test_ids_that_mean_two_things(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        Vocabulary(4, **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ids", "error", "words"),
    [
        ([5, 10, 7, 6], None, ""),
        ([5, 10, 7, 11, 12, 13, 10, 7, 6], None, ""),
        ([5, 10, 7, 11, 12, 13, 10, 7], CodesRangeError, "8 ids are no whole number of scales. Valid lengths are 4, 9"),
        ([], ArrayError, "float64"),
        ([10, 10, 7, 6], CodesRangeError, "Id 10 at 0 stands in the place of image_start=5"),
        ([5, 10, 7, 11, 12, 13, 10, 6, 6], CodesRangeError, "Id 6 at 7 stands in the place of scale_end=7"),
        ([5, 10, 7, 11, 12, 13, 10, 7, 14], CodesRangeError, "Id 14 at 8 stands in the place of image_end=6"),
        ([5, 10, 7, 11, 14, 13, 10, 7, 6], CodesRangeError, r"Id 14 at 4 is no code with offset=10. Codes are 10 \.\. 13"),
        ([5, 10, 7, 11, 6, 13, 10, 7, 6], CodesRangeError, "Id 6 at 4 is no code with offset=10"),
        (np.array([5, 2**64 - 1, 7, 6], np.uint64), CodesRangeError, "Id 18446744073709551615 at 1 is no code"),
        ([5.0, 10, 7, 6], ArrayError, "1-D integer array, not float64"),
        ([[5, 10, 7, 6]], ArrayError, r"not int64\[1, 4\]"),
        ([[5], [10, 7]], ArrayError, "cannot become an array"),
    ],
)
def test_ids_that_are_no_codes_are_named(ids: object, error: type[Exception] | None, words: str) -> None:
    vocabulary = Vocabulary(4, 10, image_start=5, image_end=6, scale_end=7)
    if error is None:
        assert vocabulary.write(vocabulary.read(ids, SCALES), SCALES).tolist() == ids  # type: ignore[arg-type]
        return
    with pytest.raises(error, match=words):
        vocabulary.read(ids, SCALES)  # type: ignore[arg-type]
