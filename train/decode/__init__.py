"""Decode with a draft and its live target."""
