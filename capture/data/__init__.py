"""From chat data to token ids and loss masks."""
