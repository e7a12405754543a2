"""Rows of chat data and the chat template: conversations before tokenisation."""
