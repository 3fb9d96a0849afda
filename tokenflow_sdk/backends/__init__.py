"""Backends that run graphs behind one interface, `Session`: onnxruntime, TensorRT and TensorRT-RTX.

Their libraries are imported when a session is opened, so that only the one in use needs to be installed.
"""
