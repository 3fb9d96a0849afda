"""Runs the `tokenflow` command as `python -m tokenflow_sdk`, for installations whose scripts are not on the PATH."""

import sys

from tokenflow_sdk.cli import main

sys.exit(main())
