"""Reading stores: rows into the caller's memory, in the order of training, ahead of the computation."""
