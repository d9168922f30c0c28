"""How good images are: features, distances, references and reports."""
