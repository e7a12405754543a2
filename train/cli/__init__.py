"""Commands of training, evaluation, experiments and export, one file per group."""
