"""Random calls of everything public raise a TokenFlowError or nothing.

Each argument is one that can work or anything else. What an object of the caller raises may pass through.
"""

from __future__ import annotations

import contextlib
import faulthandler
import inspect
import io
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import tokenflow_sdk
from tests.conftest import ROOT
from tests.support.fuzzing import LONGER, HostileError, anything, examples
from tokenflow_sdk import (
    AnswerParams,
    BuildConfig,
    Codes,
    Generator,
    Pass,
    RuntimeOptions,
    SamplingParams,
    TokenFlowError,
    Tokenizer,
    Understander,
)
from tokenflow_sdk.backends.onnxruntime import open_onnxruntime
from tokenflow_sdk.bundle.bundle import find_bundle
from tokenflow_sdk.bundle.model_config import TokenizerConfig

pytestmark = [pytest.mark.fuzz, pytest.mark.filterwarnings("ignore")]

MODELS = (Tokenizer, Generator, Understander)
# Python's own protocols that users reach by operators, `with`, `pickle` and `repr`.
SPECIAL = ("__len__", "__eq__", "__hash__", "__repr__", "__reduce__", "__enter__", "__exit__")
HANG = 60.0
"""Seconds after which a call hangs."""


def public_classes() -> list[type]:
    found = [getattr(tokenflow_sdk, name) for name in tokenflow_sdk.__all__]
    return [thing for thing in found if inspect.isclass(thing)]


def is_ours(member: object) -> bool:
    function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    return getattr(function, "__module__", "").startswith("tokenflow_sdk")


def members(cls: type) -> list[str]:
    """What is called of a class: its constructor, methods and properties, its own and inherited ones of the SDK."""
    names = (name for name in dir(cls) if not name.startswith("_") or name in SPECIAL)
    kinds = (property, classmethod, FunctionType)
    found = [name for name in names if isinstance(member := inspect.getattr_static(cls, name), kinds) and is_ours(member)]
    return found if inspect.isabstract(cls) else ["__init__", *found]


# Streams are made by models only.
TARGETS = [
    (cls, name) for cls in public_classes() for name in members(cls) if (cls, name) != (tokenflow_sdk.RequestStream, "__init__")
]


def parameters(cls: type, name: str) -> list[inspect.Parameter]:
    """The arguments of a target, without `self`."""
    if name == "__init__":
        return list(inspect.signature(cls).parameters.values())
    member = inspect.getattr_static(cls, name)
    if isinstance(member, property):
        return []
    found = list(inspect.signature(getattr(cls, name)).parameters.values())
    return found if inspect.ismethod(getattr(cls, name)) else found[1:]


class World:
    """Objects of all public classes, and arguments that work."""

    def __init__(self, generator: Path | str, understander: Path, directory: Path) -> None:
        self.sources: dict[type, Any] = {Tokenizer: "tiny", Generator: generator, Understander: understander}
        self.directory = directory
        self.open: dict[type, Any] = {}
        self.closed = {cls: self._new(cls) for cls in MODELS}
        for model in self.closed.values():
            model.close()
        self.codes: Codes = self.model(Tokenizer).encode(ROOT / "examples" / "chelsea.jpg")
        self.codes.save(directory / "codes.tfc")
        Image.new("RGB", (30, 20), "teal").save(directory / "picture.png")
        generator_codes = self.model(Generator).generate("w1", seed=1, preset="fast")
        chat = self.model(Understander).chat(np.zeros((16, 40), np.float32))
        self.examples: dict[type, Any] = {
            type(thing): thing
            for thing in (
                *(self.codes, self.codes.scales, generator_codes, next(self.model(Generator).stream("w2")), chat),
                self.model(Generator).stream("w3"),
                *(chat.ask("what?", max_tokens=2), Pass(3, 0.5), SamplingParams(), AnswerParams(), BuildConfig()),
                *(RuntimeOptions(device="cpu"), self.model(Tokenizer).bundle, TokenFlowError("What.", "How.")),
            )
        }

    def _new(self, cls: type) -> Any:
        options = {"pages": 300, "page_size": 4} if cls is not Tokenizer else {}
        return cls.from_pretrained(self.sources[cls], device="cpu", threads=1, **options)  # type: ignore[attr-defined]

    def model(self, cls: type) -> Any:
        if cls not in self.open:
            self.open[cls] = self._new(cls)
        return self.open[cls]

    def instance(self, cls: type, closed: bool) -> Any:
        if cls in MODELS:
            return self.closed[cls] if closed else self.model(cls)
        return self.examples[cls]

    def fitting(self, cls: type, parameter: inspect.Parameter) -> list[object]:
        """Values that can work for a parameter."""
        name = parameter.name
        picture, grey = self.directory / "picture.png", np.zeros((5, 7), np.uint8)
        data = picture.read_bytes()
        table: dict[str, list[object]] = {
            "image": [
                picture,
                str(picture),
                data,
                grey,
                Image.new("LA", (9, 9)),
                io.BytesIO(data),
            ],
            "images": [[picture], [grey, picture], np.zeros((1, 64, 64, 3), np.uint8), np.zeros((16, 40)), self.codes, grey],
            "codes": [self.codes, [self.codes, self.codes.truncate(2)], self.codes.truncate(1)],
            "code_indices": [self.codes.indices, self.codes.indices[None]],
            "source": [self.directory / "codes.tfc", self.codes.to_bytes()],
            "data": [self.codes.to_bytes(), {"precision": "fp16", "batch": [1, 2, 3]}],
            "path": ["codes.tfc", self.directory / "new.tfc", find_bundle("tiny", "tokenizer")],
            "name": ["tiny", self.sources.get(cls, "fast"), "rtx4090"],
            "prompt": ["w1 w2", [1, 2, 3]],
            "prompts": [["w1", [1, 2]], []],
            "negative_prompt": ["w3"],
            "question": ["what is this?"],
            "questions": [[(grey, "what?")], [(np.zeros((16, 40)), "why?"), ([picture], "who?")]],
            "preset": ["fast", "balanced"],
            "preprocess": ["crop", "squash", "pad"],
            "n": [1, 2],
            "seed": [0, 2**63 - 1],
            "cfg_scale": [0, 7.5],
            "max_tokens": [1, 3],
            "temperature": [0, 0.7],
            "params": [AnswerParams(max_tokens=2) if cls not in (Generator,) else SamplingParams()],
            "max_pixels": [10**6],
            "n_scales": [1, 2],
            "i": [0, -1],
            "timeout": [0, 0.01],
            "config": [TokenizerConfig],
            "options": [RuntimeOptions(device="cpu", threads=1)],
            "tokenizer": [self.model(Tokenizer), None],
            "bundle": [self.model(cls).bundle if cls in MODELS else Path("x")],
            "open_session": [open_onnxruntime],
            "variant": [self.codes.variant],
            "codebook_id": [self.codes.codebook_id],
            "codebook_size": [self.codes.codebook_size],
            "patch_nums": [self.codes.patch_nums],
            "row": [self.codes.indices],
            "graphs": ["encode"],
            "device": ["cpu"],
            "backend": ["onnxruntime"],
            "threads": [1, 2],
        }
        found = list(table.get(name, ()))
        example = self.examples.get(cls)
        if example is not None and hasattr(example, name) and not callable(getattr(example, name)):
            found.append(getattr(example, name))
        return found if parameter.default is parameter.empty else [parameter.default, *found]

    def arguments(self, cls: type, name: str, data: st.DataObject) -> tuple[list[object], dict[str, object]]:
        """One or two random arguments among ones that can work."""
        wanted = parameters(cls, name)
        odd = data.draw(st.sets(st.sampled_from([p.name for p in wanted]), max_size=2), "odd") if wanted else set()
        positional: list[object] = []
        keywords: dict[str, object] = {}
        for parameter in wanted:
            fitting = self.fitting(cls, parameter)
            value: Any = anything if parameter.name in odd or not fitting else st.sampled_from(fitting)
            if parameter.kind is parameter.VAR_KEYWORD:
                fields = list(inspect.signature(cls).parameters)
                keywords |= data.draw(st.dictionaries(st.sampled_from(fields), anything, max_size=2), parameter.name)
            elif parameter.kind is parameter.VAR_POSITIONAL:
                positional += data.draw(st.lists(value, max_size=2), parameter.name)
            elif parameter.kind is parameter.POSITIONAL_ONLY or name in SPECIAL:
                positional.append(data.draw(value, parameter.name))
            else:
                keywords[parameter.name] = data.draw(value, parameter.name)
        return positional, keywords


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Ends the process, with every thread's stack, when a call hangs; gigabytes cannot be had."""
    faulthandler.dump_traceback_later(HANG, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def world(mini_generator: Path, mini_understander: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    directory = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as opened:
        patch.chdir(directory)
        patch.setenv("TOKENFLOW_CACHE", str(directory / "cache"))
        # No name of a bundle may be asked for on the hub.
        huggingface_hub = pytest.importorskip("huggingface_hub")
        patch.setattr(huggingface_hub, "snapshot_download", _offline)
        world = World(mini_generator, mini_understander, directory)
        yield world
        for model in world.open.values():
            opened.callback(model.close)


def _offline(*_: object, **__: object) -> None:
    raise OSError("offline")


@pytest.fixture(scope="module", autouse=True)
def little_memory() -> Iterator[None]:
    """No call may take gigabytes."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 2**42
    resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**30, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


def call(target: Callable[[], Any]) -> None:
    """Call, and use what comes back a little."""
    with bounded():
        try:
            result = target()
            repr(result)
            if isinstance(result, Iterator) and hasattr(result, "close"):
                with contextlib.closing(result):
                    list(itertools.islice(result, 3))
            elif type(result) in public_classes() and type(result) not in MODELS:
                for name in members(type(result)):
                    if isinstance(inspect.getattr_static(type(result), name), property):
                        getattr(result, name)
            if type(result) in MODELS:
                result.close()
        except (TokenFlowError, HostileError, MemoryError):
            pass


@pytest.mark.parametrize(("cls", "name"), TARGETS, ids=[f"{cls.__name__}.{name}" for cls, name in TARGETS])
def test_only_named_errors(cls: type, name: str, world: World) -> None:
    wanted = parameters(cls, name)

    @examples(30 if wanted and name not in SPECIAL else 3)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        arguments, keywords = world.arguments(cls, name, data)
        if name == "__init__" or inspect.ismethod(getattr(cls, name, None)):
            function = cls if name == "__init__" else getattr(cls, name)
            call(lambda: function(*arguments, **keywords))
            return
        instance = world.instance(cls, closed=data.draw(st.sampled_from([False, False, False, True]), "closed"))
        call(
            lambda: getattr(instance, name)(*arguments, **keywords) if callable(getattr(cls, name)) else getattr(instance, name)
        )
        if name in ("close", "__exit__"):
            world.open.pop(cls, None)

    run()


def test_everything_public_is_called() -> None:
    called = {f"{cls.__name__}.{name}" for cls, name in TARGETS}
    assert called >= {"Tokenizer.from_pretrained", "Generator.stream", "Chat.ask", "Codes.__init__", "Generation.images"}
    assert {cls for cls, _ in TARGETS} == set(public_classes())
    assert LONGER * sum(30 for cls, name in TARGETS if parameters(cls, name)) >= 2000
