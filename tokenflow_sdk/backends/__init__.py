"""Inference engines behind one small interface, `Session`. Each module imports its engine on use, never on import."""

from tokenflow_sdk.backends.base import Session, SessionOptions

__all__ = ["Session", "SessionOptions"]
