from __future__ import annotations

import json

import numpy as np

from tokenflow_sdk.server.answers import JsonAnswer


def test_answers_are_json_of_the_same_numbers() -> None:
    values = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    content = {"text": 'ü"\n', "none": None, "values": values.tolist(), "bare": [float("nan"), float("inf"), 1e-5, 2**40]}
    answer = JsonAnswer(content, 201)
    assert (answer.status_code, answer.headers["content-type"]) == (201, "application/json")
    assert json.loads(answer.body) == content | {"bare": [None, None, 1e-5, 2**40]}
