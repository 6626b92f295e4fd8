"""The parts of `benchmarks.peers`: environments of other programs, the plan, one run, and the table."""
