"""What a process computes on and how it speaks: ranks, precision, compiler, profiler, console, trackers."""
