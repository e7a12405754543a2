"""The commands of stage 2, a file per group."""
