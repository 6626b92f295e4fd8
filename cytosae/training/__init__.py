"""Training an autoencoder: losses, the training step, learning-rate schedules, where biases start."""
