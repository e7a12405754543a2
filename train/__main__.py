"""`python -m train ...` is `dspark train ...`."""

import sys

from pipeline.cli import cli

cli(["train", *sys.argv[1:]], prog_name="dspark")
