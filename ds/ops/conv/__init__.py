"""Convolutions: fused for inference, in tiles for training, and the tiles themselves."""
