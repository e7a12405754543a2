"""Rows of chat data, and the chat template that renders them to text."""
