"""Inference for TokenFlow, the unified image tokenizer (arXiv 2412.03069): pictures to codes and back, without torch."""

from tokenflow_sdk.codes import Codes
from tokenflow_sdk.errors import TokenFlowError
from tokenflow_sdk.generator import Generator
from tokenflow_sdk.sampling import SamplingParams
from tokenflow_sdk.tokenizer import Tokenizer

__all__ = ["Codes", "Generator", "SamplingParams", "TokenFlowError", "Tokenizer", "__version__"]

__version__ = "0.1.0"
