"""The process a run executes in: ranks, precision, compiler, profiler, console and trackers."""
