"""Runs the server with the settings of the environment: `python -m tokenflow_sdk.server`."""

from __future__ import annotations

import logging
import sys

from tokenflow_sdk.errors import TokenFlowError
from tokenflow_sdk.server.run import serve
from tokenflow_sdk.server.settings import settings_from

logging.basicConfig(level=logging.INFO, format="%(message)s")
try:
    serve(settings_from({}))
except TokenFlowError as error:
    sys.exit(f"error: {error}")
