"""Training: the trainer and its parts, and the presets of each dataset."""
