"""The command line: one file a verb. A verb's options are the fields of its dataclass."""
