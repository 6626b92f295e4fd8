"""Training: fused losses, the training step, learning-rate schedules, metrics, and initial biases."""
