"""`tokenflow serve` on Ray Serve: the same app in every replica, with the settings of its environment (TOKENFLOW_SERVE_...).

PYTHONPATH=examples/ray_serve serve run examples/ray_serve/cpu.yaml
"""

from __future__ import annotations

import asyncio

from fastapi import FastAPI
from ray import serve

from tokenflow_sdk.server import create_app


def build() -> FastAPI:
    """The app, made in the replica: models do not travel between processes."""
    failures: list[BaseException] = []
    app = create_app(failed=failures.append)
    app.state.failures = failures
    return app


@serve.deployment
@serve.ingress(build)
class TokenFlow:
    """A replica. Ray sends it requests once its first health check is over, and starts another if one fails."""

    app: FastAPI

    async def check_health(self) -> None:
        """Wait until the models are warm.

        Raises:
            TokenFlowError: they cannot be opened.
        """
        while not self.app.state.models.ready:
            if self.app.state.failures:
                raise self.app.state.failures[0]
            await asyncio.sleep(0.1)


app = TokenFlow.bind()
