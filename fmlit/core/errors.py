"""The errors that a command reports in one line. Any other error is a bug, and keeps its traceback."""

import errno


class UserError(ValueError):
    """A mistake that the user can fix.

    The message is one line. It names the key, file or value that is wrong, and the fix. Commands print that line and
    end with exit code 2. Programs catch it as a ``ValueError``.
    """

    def __init__(self, message: str) -> None:
        super().__init__(original_message(message, type(self)))


class FileError(UserError, OSError):
    """A file, folder or disk that cannot be read or written, which the user can fix. It is an ``OSError``, too."""


class LostProcessError(RuntimeError):
    """Another process has ended or cannot be reached. Commands end with exit code 1: it is worth another try."""


class LeaseLostError(RuntimeError):
    """Another launch owns the run folder now. Commands end with exit code 76: the other one goes on."""


class TryAgainError(RuntimeError):
    """Something that may well be different at another time. Commands end with exit code 75."""


class StorageError(FileError, TryAgainError):
    """A disk that is full, read-only or failing. Commands end with exit code 75: there may be room at another time."""


MISTAKES = (UserError, FileNotFoundError)
PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}  # what may cure itself
ENDINGS = {LeaseLostError: 76, TryAgainError: 75, LostProcessError: 1, UserError: 2, FileNotFoundError: 2}  # exit codes
INTERRUPTED = 130  # the exit code that shells report for Ctrl-C


def writing_error(message: str, cause: OSError) -> FileError:
    """The error for a file that could not be written: a ``StorageError`` if another try may well succeed."""
    return StorageError(message) if cause.errno in PASSING else FileError(message)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or the name of its class if it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def kind_of(error: BaseException) -> str:
    """A name for other processes of what an error means, for ``from_rank``."""
    kinds = (LeaseLostError, StorageError, TryAgainError)
    mistake = UserError.__name__ if isinstance(error, MISTAKES) else ""
    return next((kind.__name__ for kind in kinds if isinstance(error, kind)), mistake)


def from_rank(rank: int, message: str, kind: str) -> Exception:
    """The error of another rank, of the kind that ``kind_of`` has named there."""
    kinds = {known.__name__: known for known in (UserError, LeaseLostError, StorageError, TryAgainError)}
    return kinds.get(kind, RuntimeError)(f"rank {rank}: {message}")


def original_message(message: str, kind: type[BaseException]) -> str:
    """The message of an exception that may come from a worker process.

    A ``DataLoader`` rebuilds an exception of a worker from the text of its whole traceback. The message that was meant
    for people is the end of that text, after the name of the class.
    """
    if "\nOriginal Traceback (most recent call last)" in message:
        return message.rpartition(f"{kind.__name__}: ")[2].strip()
    return message
