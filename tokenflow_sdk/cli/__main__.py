"""`python -m tokenflow_sdk.cli`, for where scripts are not on the PATH."""

import sys

from tokenflow_sdk.cli import main

sys.exit(main())
