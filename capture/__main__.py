"""`python -m capture ...` is `dspark capture ...`."""

from pipeline.cli import main

main("capture")
