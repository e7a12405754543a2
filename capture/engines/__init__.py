"""Engines that run the target for a capture, behind one interface."""
