"""`python -m capture ...` is `dspark capture ...`."""

import sys

from pipeline.cli import cli

cli(["capture", *sys.argv[1:]], prog_name="dspark")
