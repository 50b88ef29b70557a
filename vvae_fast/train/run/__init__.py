"""One training run: configuration, model, training, checkpoints, evaluation."""
