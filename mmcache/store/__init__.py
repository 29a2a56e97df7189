"""What one shard keeps: the index, its policy and its allocator (pure), and the arena they describe."""
