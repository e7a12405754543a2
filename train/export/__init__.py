"""Drafts as inference engines load them, and released drafts as runs."""
