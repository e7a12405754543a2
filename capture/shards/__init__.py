"""From batches of tokens to shards on disk, proved before the first one."""
