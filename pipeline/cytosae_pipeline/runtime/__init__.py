"""What a process runs on: devices, memory, signals, workers, progress."""
