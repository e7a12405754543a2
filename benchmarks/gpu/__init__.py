"""One command that proves and measures this project on a GPU machine: `python -m benchmarks.gpu`."""
