"""Other caches beside mmcache, measured on the same keys and bytes: `make bench-peers`; see docs/bench.md."""
