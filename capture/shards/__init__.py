"""From batches of tokens to shards on disk, after a proof that the states are the target's."""
