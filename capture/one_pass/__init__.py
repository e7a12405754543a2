"""Answers and states in one pass: the engine answers the prompts, and the states of that run are kept."""
