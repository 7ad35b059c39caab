"""What can go wrong because of the input. Every message names the thing, the value and the mend."""


class LsemvaeError(ValueError):
    """A mistake in what the user gave. Commands print its one line and exit with status 2."""


class StorageError(LsemvaeError):
    """A folder or an object store that fails or refuses; the file that was asked for is not the cause.

    `passing` says whether the same request may succeed later, `overloaded` that the store asks for fewer requests.
    """

    def __init__(self, message: str, passing: bool = True, overloaded: bool = False) -> None:
        super().__init__(message)
        self.passing = passing
        self.overloaded = overloaded


class FileTooLarge(LsemvaeError):
    """A file that has more bytes (`size`) than its reader accepts; it has not been read."""

    def __init__(self, path: str, size: int, max_bytes: int) -> None:
        super().__init__(f"{path} has {size} bytes: {max_bytes} are the limit")
        self.size = size


class UnreadableRecording(LsemvaeError):
    """A recording that no reader can turn into a `Record`. `code` is the short reason used in tables."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Refused(LsemvaeError):
    """A readable recording that preprocessing refuses. `code` is the short reason used in tables."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class BundleError(LsemvaeError):
    """A model directory that is incomplete, altered, or made by something this version does not know."""
