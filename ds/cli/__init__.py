"""The command line: one file a verb, and a verb's options are the fields of its dataclass."""

# The class of each verb, which is in the file of its name, and its line in `dstudent --help`.
VERBS = {
    "demo": ("Demo", "", "run the whole chain on scanned digits, in minutes"),
    "doctor": ("Doctor", "", "show what this machine has and which kernels run here"),
    "teach": ("Teach", "PRESET", "train a teacher on pictures of your own, or digits"),
    "pairs": ("MakePairs", "PRESET", "make (noise, image) pairs; or info, verify, export"),
    "distill": ("Distill", "PRESET", "train a student, after making the pairs it lacks"),
    "sample": ("Sample", "MODEL", "draw images from a teacher or a student"),
    "evaluate": ("Evaluate", "MODEL", "compare a model's images with real ones"),
    "report": ("Report", "RUN [RUN ...]", "write a page about a run, or compare several"),
    "verify": ("Verify", "[METHOD ...]", "hold methods against the truth, in minutes"),
    "convert": ("Convert", "MODEL OUT", "write a model in another format"),
}
