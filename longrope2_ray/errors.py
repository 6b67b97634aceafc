"""The errors that end a run or refuse an input; each message says what to change."""


class StoppedError(RuntimeError):
    """A run cannot go on; what is committed stays, the message names the recipe field to change."""


class RecipeError(ValueError):
    """A recipe cannot be used; the message has a line for each mistake."""


class RunDirError(ValueError):
    """A run directory cannot be used; the message says what to do."""


class CorruptFileError(RunDirError):
    """A file's checksum does not match: it is torn, truncated or edited."""


class FencedError(StoppedError):
    """A newer driver owns the run directory; this one must not write to it any more."""
