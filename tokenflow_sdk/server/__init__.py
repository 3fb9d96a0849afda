"""The server of the extra `serve`: tokenizing, drawing and answering over HTTP.

`create_app` makes the ASGI app, for uvicorn, gunicorn, hypercorn or Ray Serve; `tokenflow serve` runs it by itself.
"""

from __future__ import annotations

from tokenflow_sdk.server.app import create_app
from tokenflow_sdk.server.settings import Settings

__all__ = ["Settings", "create_app"]
