"""The one error that a user's mistake raises."""


class UserError(ValueError):
    """A mistake that the user can fix.

    The message is one line. It names the key, file or value that is wrong, and the fix. Commands print that line and
    end with exit code 2. Programs catch it as a ``ValueError``. Any other error is a bug, and keeps its traceback.
    """
