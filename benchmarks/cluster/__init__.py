"""A real cluster and a simulated one under the same requests, while a shard dies or joins: `benchmarks.bench_cluster`."""
