"""Pairs of noise and the image a teacher makes of it: stores, archives, sources of batches."""
