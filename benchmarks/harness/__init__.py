"""What the benchmarks share: engines behind one interface, workers, prompts, statistics, records."""
