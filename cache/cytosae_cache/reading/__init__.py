"""Reading stores: rows into the caller's memory, in training order, prefetched while the caller computes."""
