"""Inference for TokenFlow, the unified image tokenizer (arXiv 2412.03069): pictures to codes and back, without torch."""

from tokenflow_sdk.codes import Codes
from tokenflow_sdk.errors import TokenFlowError
from tokenflow_sdk.generator import Generator
from tokenflow_sdk.sampling import SamplingParams
from tokenflow_sdk.token_sampling import AnswerParams
from tokenflow_sdk.tokenizer import Tokenizer
from tokenflow_sdk.understander import Answer, Chat, Understander

__all__ = [
    "Answer",
    "AnswerParams",
    "Chat",
    "Codes",
    "Generator",
    "SamplingParams",
    "TokenFlowError",
    "Tokenizer",
    "Understander",
    "__version__",
]

__version__ = "0.1.0"
