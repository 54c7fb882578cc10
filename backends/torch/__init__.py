"""PyTorch: the decoder as real modules, for training, for the control runs of the proof, and as a runtime."""
