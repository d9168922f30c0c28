"""Pages for people: what a run has done, several runs side by side, the figures of a model."""
