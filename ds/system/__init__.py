"""Configuration, files, processes and signals: what every other room uses."""
