"""The identities of the methods of ds/methods/consistency, a file of the same name for each."""
