"""Speed and memory beside peers: run as `python -m benchmarks.throughput`, `.study` and `.growth`."""
