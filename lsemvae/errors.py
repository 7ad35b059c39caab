"""Errors caused by the input. Every message names the file or setting, its value and the mend."""


class LsemvaeError(ValueError):
    """A mistake in the user's input. Commands print it in one line and exit with status 2."""


class StorageError(LsemvaeError):
    """A folder or an object store that fails or refuses; the file that was asked for is not the cause.

    `passing` says whether the same request may succeed later, `overloaded` that the store asks for fewer requests.
    """

    def __init__(self, message: str, passing: bool = True, overloaded: bool = False) -> None:
        super().__init__(message)
        self.passing = passing
        self.overloaded = overloaded


class DamagedFile(LsemvaeError):
    """A file of this project's own that is cut or garbled."""


class FileTooLarge(LsemvaeError):
    """A file that has more bytes (`size`) than its reader accepts; it has not been read."""

    def __init__(self, path: str, size: int, max_bytes: int) -> None:
        super().__init__(f"{path} has {size} bytes: {max_bytes} are the limit")
        self.size = size


class UnreadableRecording(LsemvaeError):
    """A recording that no reader can turn into a `Record`. `code` is a short reason for tables."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Refused(LsemvaeError):
    """A readable recording that preprocessing refuses. `code` is a short reason for tables."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class BundleError(LsemvaeError):
    """A model directory that is incomplete, altered, or written by an unknown version."""
