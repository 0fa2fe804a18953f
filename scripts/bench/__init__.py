"""The parts of `scripts/bench.py`: workloads, checkpoints, limits, peers, results."""
