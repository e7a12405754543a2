"""The DSpark draft: a parallel block backbone, a Markov head and a confidence head."""
