"""What each verb of the command line does. A verb's options are the fields of its dataclass."""

from ds.verbs.command import run
from ds.verbs.distill import Distill
from ds.verbs.pairs import MakePairs
from ds.verbs.teach import Teach

__all__ = ["Distill", "MakePairs", "Teach", "run"]
