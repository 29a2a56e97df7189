"""Which shard owns what."""
