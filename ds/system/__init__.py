"""What every room stands on: configuration, files, processes, signals."""
