"""Rows of chat data and the chat template: what conversations look like before they are tokens."""
