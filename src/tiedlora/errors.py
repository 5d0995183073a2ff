"""The one exception that speaks to the person at the keyboard."""


class UserError(Exception):
    """A mistake the user can mend.

    The message is one line: it names the key or file, what is wrong, what is allowed, what to do.
    Entry points print it without a traceback and exit with code 2; every other exception is a bug
    and keeps its traceback.
    """
