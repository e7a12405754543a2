"""`python -m pipeline ...` is `dspark ...`."""

from pipeline.cli import main

main()
