"""Stage two's training: runs, batches, the loop, evaluation, sweeps, loggers."""
