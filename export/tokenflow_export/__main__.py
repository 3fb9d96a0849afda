"""`python -m tokenflow_export`, the same as `tokenflow export`."""

import sys

from tokenflow_export.cli import main

sys.exit(main())
