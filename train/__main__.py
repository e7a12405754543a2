"""`python -m train ...` is `dspark train ...`."""

from pipeline.cli import main

main("train")
