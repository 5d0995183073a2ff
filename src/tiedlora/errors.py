"""The one exception that speaks to the person at the keyboard."""

import errno


class UserError(Exception):
    """A mistake the user can mend.

    The message is one line: it names the key or file, what is wrong, what is allowed, what to do.
    Entry points print it without a traceback and exit with code 2; every other exception is a bug
    and keeps its traceback.
    """


_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED", "bad_alloc")


def out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory: torch has a class for a GPU's alone, and libraries below it have none."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )
