"""Real clusters and simulated ones under the same requests, while a shard dies or joins: benchmarks.bench_cluster."""
