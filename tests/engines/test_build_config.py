from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.mutations import ODD, SPECIAL, mutated_bytes, no_hang
from tokenflow_sdk.engines.build_config import BuildConfig, build_config_names
from tokenflow_sdk.errors import ArgumentError


@pytest.mark.parametrize("name", build_config_names())
def test_every_recipe_is_a_plan(name: str) -> None:
    build_config = BuildConfig.from_file(name)
    if name.startswith("cpu"):
        assert build_config.backend == ("onnxruntime" if name == "cpu" else "openvino")
    else:
        assert build_config.backend in ("tensorrt", "tensorrt-rtx")
    # Only TensorRT-RTX builds for a GPU that is not there.
    assert bool(build_config.targets) == (build_config.backend == "tensorrt-rtx")


def test_the_recipes_people_look_for_are_there() -> None:
    for_cpus = {"cpu", "cpu-bf16", "cpu-bf16-decoder", "cpu-int8-decoder"}
    assert {"h100", "l4", "rtx4090", "rtx50", "jetson-orin", *for_cpus} <= set(build_config_names())


def test_a_recipe_of_ones_own_and_changes_to_it(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('about = "mine"\ntargets = ["sm75"]\nbatch = [1, 4, 8]\n')
    build_config = BuildConfig.from_file(str(path))
    assert (build_config.targets, build_config.batch, build_config.precision) == (("sm75",), (1, 4, 8), "fp16")
    assert build_config.with_overrides(precision="fp32", batch=None).precision == "fp32"
    assert build_config.with_overrides(batch=None).batch == (1, 4, 8)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("batch = [1, 2", "cannot be read as TOML"),
        ("speed = 3", "says 'speed'"),
        ("batch = [3, 2, 1]", "least, usual and most"),
        ("batch = [2, 4, 8]", "from one on"),
        ("batch = 3", "wrong kind|least, usual and most"),
        ('precision = "fp4"', "no precision 'fp4'"),
        ('decoder = "int4"', "no decoder in 'int4'.*int8, fp8, bf16"),
        ('decoder = "bf16"', "a decoder in bf16 is for OpenVINO"),
        ("pages = -1", "pages=-1 is no number of pages"),
        ("pages = 1e400", "no number of pages"),
        ("workspace_gb = nan", "no number of GiB"),
        ('targets = "sm86"', "targets cannot be of type str"),
        ('targets = [["sm86"]]', "targets cannot be of type"),
        ('backend = "cuda"', "no backend .cuda."),
        ('backend = "openvino"', "computes in fp32 or bf16 on a CPU, not in fp16"),
        ('backend = "openvino"\nprecision = "bf16"\ndecoder = "fp8"', "No CPU computes convolutions in fp8"),
        ('backend = "openvino"\nprecision = "bf16"\ntargets = ["sm86"]', "for the processor of this machine"),
        ("batch = [1, 1, 1.0]", "batch=1.0 is no number of images"),
    ],
)
def test_mistakes_in_recipes_are_named(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(ArgumentError, match=words):
        BuildConfig.from_file(str(tmp_path / "r.toml"))


def test_a_plan_names_the_command_that_builds_it() -> None:
    assert BuildConfig().command(Path("b")) == "tokenflow build b --backend tensorrt-rtx"
    build_config = BuildConfig("tensorrt", precision="bf16", decoder="fp8", batch=(1, 2, 4))
    assert (
        build_config.command(Path("b"))
        == "tokenflow build b --backend tensorrt --precision bf16 --decoder fp8 --batch-limit 4 --batch-usual 2"
    )
    build_config = BuildConfig("tensorrt", pages=70, workspace_gb=1.5)
    assert build_config.command(Path("b")) == "tokenflow build b --backend tensorrt --pages 70 --workspace-gb 1.5"


def test_no_such_recipe() -> None:
    with pytest.raises(ArgumentError, match="no build config 'abacus'.*rtx4090"):
        BuildConfig.from_file("abacus")


def test_a_plan_is_stored_with_its_engines_and_read_again() -> None:
    build_config = BuildConfig("tensorrt", ("sm86",), "fp32", "int8", (1, 2, 4), 70, 1.5)
    stored = json.loads(json.dumps(build_config.to_json()))
    assert stored == build_config.to_json()
    assert BuildConfig.from_json(stored) == build_config.with_overrides(targets=())
    assert BuildConfig.from_json(stored | {"sparsity": True}) is None
    assert BuildConfig.from_json(stored | {"precision": "fp4"}) is None


def test_what_engines_of_a_plan_can_take() -> None:
    build_config = BuildConfig(batch=(1, 2, 4), pages=70)
    assert [build_config.supports(batch, pages) for batch, pages in ((4, None), (5, None), (1, 70), (1, 71))] == [
        True,
        False,
        True,
        False,
    ]


def test_any_damage_is_named(tmp_path: Path) -> None:
    path, rng = tmp_path / "mine.toml", random.Random(0)
    original = b'about = "mine"\ntargets = ["sm75"]\nbatch = [1, 4, 8]\npages = 3\nworkspace_gb = 1.5\nprecision = "bf16"\n'
    path.write_bytes(original)
    assert BuildConfig.from_file(str(path)).pages == 3
    with no_hang():
        for _ in range(300):
            path.write_bytes(mutated_bytes(original, rng))
            try:
                BuildConfig.from_file(str(path))
            except ArgumentError:
                continue


@pytest.mark.parametrize(
    "content", [b"a = " + b"[" * 100_000, b"\xff", b"pages = " + b"9" * 5000, b"a" * 2**21, b"pages = 1979-05-27"]
)
def test_what_is_no_config_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_bytes(content)
    with pytest.raises(ArgumentError):
        BuildConfig.from_file(str(tmp_path / "mine.toml"))


@pytest.mark.parametrize("put", SPECIAL)
def test_what_is_no_file_is_no_config(put: Callable[[Path], None], tmp_path: Path) -> None:
    put(tmp_path / "mine.toml")
    with no_hang(), pytest.raises(ArgumentError, match="There is no build config"):
        BuildConfig.from_file(str(tmp_path / "mine.toml"))


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "a" * 5000, ""])
def test_a_name_that_no_file_can_have_names_no_config(name: str) -> None:
    with pytest.raises(ArgumentError, match="There is no build config"):
        BuildConfig.from_file(name)


@pytest.mark.parametrize("field", ["backend", "targets", "precision", "decoder", "batch", "pages", "workspace_gb"])
def test_every_setting_is_checked(field: str) -> None:
    """What is left can be compared, hashed and written."""
    for value in (*ODD, ("sm86", 5), (1, 2), (1, 1, 10**30), (0, 1, 1)):
        changes: dict[str, Any] = {field: value}
        try:
            config = BuildConfig(**changes)
        except ArgumentError:
            continue
        assert BuildConfig.from_json(json.loads(json.dumps(config.to_json()))) is not None
        assert isinstance(hash(config), int)


@pytest.mark.parametrize("written", ["sm89", "sm_89", "SM_89", "8.9", "89", " sm89 "])
def test_architectures_may_be_written_as_nvidia_does(written: str) -> None:
    assert BuildConfig(targets=(written, "sm_120")).targets == ("sm89", "sm120")
