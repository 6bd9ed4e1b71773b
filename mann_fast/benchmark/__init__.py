"""What the benchmarks measure with and against: an interleaving timer, counted cost, ceilings and baselines."""
