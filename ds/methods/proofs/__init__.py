"""The identities of the methods, a file of the same name for each: see ds.methods.proof."""
