"""Destinations of a run's metrics: a JSON-lines file, TensorBoard, Weights & Biases; `base` is their interface."""
