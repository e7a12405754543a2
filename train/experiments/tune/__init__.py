"""`dspark tune`: a successive-halving search over settings of a run, by optuna, within a budget of time."""
