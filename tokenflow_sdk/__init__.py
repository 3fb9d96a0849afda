"""Inference for TokenFlow, the unified image tokenizer (arXiv 2412.03069): images to codes and back, without torch.

Everything that users need is importable from here. It is imported when it is first used, so that `import tokenflow_sdk` costs
hardly more than nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenflow_sdk.bundle.bundle import Bundle
    from tokenflow_sdk.dataset.reading import read_codes
    from tokenflow_sdk.engines.build_config import BuildConfig
    from tokenflow_sdk.engines.options import RuntimeOptions
    from tokenflow_sdk.errors import TokenFlowError
    from tokenflow_sdk.generation.generator import Generator
    from tokenflow_sdk.generation.results import GeneratedScale, Generation
    from tokenflow_sdk.model.sampling import Pass, SamplingParams
    from tokenflow_sdk.pictures.codes import Codes
    from tokenflow_sdk.pictures.scales import Scales
    from tokenflow_sdk.request_runner import RequestStream
    from tokenflow_sdk.tokenizer import Tokenizer
    from tokenflow_sdk.understanding.answering import Answer
    from tokenflow_sdk.understanding.chat import Chat
    from tokenflow_sdk.understanding.params import AnswerParams
    from tokenflow_sdk.understanding.understander import Understander

__all__ = [
    "Answer",
    "AnswerParams",
    "BuildConfig",
    "Bundle",
    "Chat",
    "Codes",
    "GeneratedScale",
    "Generation",
    "Generator",
    "Pass",
    "RequestStream",
    "RuntimeOptions",
    "SamplingParams",
    "Scales",
    "TokenFlowError",
    "Tokenizer",
    "Understander",
    "__version__",
    "read_codes",
]

__version__ = "0.1.0"

_HOMES = {
    "Answer": "understanding.answering",
    "AnswerParams": "understanding.params",
    "BuildConfig": "engines.build_config",
    "Bundle": "bundle.bundle",
    "Chat": "understanding.chat",
    "Codes": "pictures.codes",
    "GeneratedScale": "generation.results",
    "Generation": "generation.results",
    "Generator": "generation.generator",
    "Pass": "model.sampling",
    "RequestStream": "request_runner",
    "RuntimeOptions": "engines.options",
    "SamplingParams": "model.sampling",
    "Scales": "pictures.scales",
    "TokenFlowError": "errors",
    "Tokenizer": "tokenizer",
    "Understander": "understanding.understander",
    "read_codes": "dataset.reading",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
