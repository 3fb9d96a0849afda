"""PyTorch definitions of the released tokenizers, under the released state-dict keys. Plain and eager: the reference."""

from tokenflow_export.models.tokenizer import TokenFlowTokenizer

__all__ = ["TokenFlowTokenizer"]
