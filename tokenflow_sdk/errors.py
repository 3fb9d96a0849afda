"""Every exception that the SDK raises for a problem the user can fix.

    TokenFlowError
    ├── ArgumentError            an option or argument has an invalid value
    ├── ImageError               an image cannot be used
    │   ├── ImageReadError       no such file, a directory, no permission, an unreadable file object
    │   ├── CorruptImageError    empty, truncated, or not an image
    │   ├── ImageTooLargeError   more pixels than allowed (decompression bomb)
    │   └── ImageShapeError      an extreme aspect ratio, or not the size that the bundle takes
    ├── ArrayError               an array has the wrong dtype or rank, or holds NaN or infinity
    ├── CodesError               code indices cannot be used
    │   ├── CodesReadError       no such file, or it cannot be read
    │   ├── CorruptCodesError    not a .tfc file, a wrong checksum, or truncated within a scale
    │   ├── CodesRangeError      an index outside the codebook, or an incomplete scale
    │   └── CodebookMismatchError  codes or a language model made with another codebook
    ├── BundleError              a bundle cannot be used
    │   ├── BundleNotFoundError  no bundle at that path or id
    │   ├── BundleKindError      a bundle of the wrong kind, e.g. a generator where a tokenizer is needed
    │   ├── CorruptBundleError   a file is missing, or its hash, inputs or outputs differ from bundle.json
    │   └── BundleVersionError   written for a newer SDK
    ├── DatasetError             a data set, or a shard of it, cannot be used: not there, damaged, changed, a column is missing
    │   ├── DatasetFileError     one file cannot be used: missing, no permission, not a regular file, too large
    │   └── StorageError         a disk, network or service failed; the same may work later
    ├── CheckpointError          a released checkpoint cannot be loaded (export only)
    ├── ParityError              an exported or stored graph does not reproduce its reference
    ├── PromptError              a prompt is empty or too long
    ├── PagesExhausted           the pool of key/value pages is too small for what was asked
    ├── RequestTimeoutError      a request was not finished within its `timeout`
    ├── RequestCancelledError    a stream was closed before its end, and then read
    ├── BackendError             a backend cannot start, or cannot load or run a graph
    │   ├── EngineBuildError     TensorRT cannot build an engine from a graph
    │   ├── EngineRefusedError   an engine does not reproduce its bundle's reference
    │   └── NotFiniteError       a model computed NaN or infinity for a request
    ├── MissingPackageError      an optional package is not installed
    └── OutputError              a result cannot be written (read-only, disk full, exists)

Each has two parts, both in `str(error)`: `message` names the thing and says what is wrong with it, `hint` says how to fix it.
Other exceptions that leave the SDK, e.g. a TypeError, are bugs of the SDK.

What is probably not as wished but can go on is a warning, and `warnings.filterwarnings` decides about it:

    UserWarning
    ├── ColorProfileWarning      a picture's colour profile cannot be applied; its colours are read as stored
    └── PreparationWarning       codes of a picture that was prepared otherwise than a language model expects
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "ArgumentError",
    "ArrayError",
    "BackendError",
    "BundleError",
    "BundleKindError",
    "BundleNotFoundError",
    "BundleVersionError",
    "CheckpointError",
    "CodebookMismatchError",
    "CodesError",
    "CodesRangeError",
    "CodesReadError",
    "ColorProfileWarning",
    "CorruptBundleError",
    "CorruptCodesError",
    "CorruptImageError",
    "DatasetError",
    "DatasetFileError",
    "EngineBuildError",
    "EngineRefusedError",
    "ImageError",
    "ImageReadError",
    "ImageShapeError",
    "ImageTooLargeError",
    "MissingPackageError",
    "NotFiniteError",
    "OutputError",
    "PagesExhausted",
    "ParityError",
    "PreparationWarning",
    "PromptError",
    "RequestCancelledError",
    "RequestTimeoutError",
    "StorageError",
    "TokenFlowError",
]


class TokenFlowError(Exception):
    """Base of all exceptions in this module.

    Args:
        message: a sentence that names the thing and says what is wrong with it.
        hint: a sentence with the command, argument or step that fixes it.
    """

    def __init__(self, message: str, hint: str) -> None:
        # OSError would take a second argument for the text of an error number.
        super().__init__(message)
        self.args = (message, hint)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (type(self), self.message, self.hint, vars(self))

    def __str__(self) -> str:
        return f"{self.message} {self.hint}"


def _restored(kind: type[TokenFlowError], message: str, hint: str, attributes: dict[str, Any]) -> TokenFlowError:
    """A copy of an error, e.g. in another process. Not by `kind(...)`: subclasses may take other arguments."""
    error = kind.__new__(kind, message, hint)
    TokenFlowError.__init__(error, message, hint)
    vars(error).update(attributes)
    return error


class ArgumentError(TokenFlowError, ValueError):
    """An option or argument has an invalid value."""


class ImageError(TokenFlowError):
    """An image cannot be used."""


class ImageReadError(ImageError, OSError):
    """An image file does not exist, is a directory, or cannot be read."""

    __str__ = TokenFlowError.__str__


class CorruptImageError(ImageError):
    """An image file is empty, truncated, or not an image."""


class ImageTooLargeError(ImageError):
    """An image has more pixels than allowed."""


class ImageShapeError(ImageError):
    """An image has an extreme aspect ratio, or not the size that the bundle takes."""


class ArrayError(TokenFlowError, ValueError):
    """An array has the wrong dtype or rank, or holds NaN or infinity."""


class CodesError(TokenFlowError):
    """Code indices cannot be used."""


class CodesReadError(CodesError, OSError):
    """A file of codes does not exist, is a directory, or cannot be read."""

    __str__ = TokenFlowError.__str__


class CorruptCodesError(CodesError):
    """A file is not a `.tfc` file, has a wrong checksum, or is truncated within a scale."""


class CodesRangeError(CodesError, ValueError):
    """An index is outside the codebook, or the codes end within a scale."""


class CodebookMismatchError(CodesError):
    """Codes, a language model or a PNG's metadata were made with another codebook or model."""


class BundleError(TokenFlowError):
    """A bundle cannot be used."""


class BundleNotFoundError(BundleError):
    """There is no bundle at that path, name or hub id."""


class BundleKindError(BundleError):
    """A bundle is of another kind than asked for, e.g. a generator instead of a tokenizer."""


class CorruptBundleError(BundleError):
    """A file of a bundle is missing, or its hash, inputs or outputs differ from what bundle.json says."""


class BundleVersionError(BundleError):
    """A bundle was written for a newer SDK."""


class DatasetError(TokenFlowError):
    """A data set, or a shard of it, cannot be used: not there, damaged, changed since it was listed, a column is missing."""


class DatasetFileError(DatasetError):
    """One file of a data set is missing, may not be read, is not a regular file, or is too large."""


class StorageError(DatasetError, OSError):
    """A disk, network or service failed while a data set was read or written. The same may work later."""

    __str__ = TokenFlowError.__str__


class CheckpointError(TokenFlowError):
    """A checkpoint cannot be loaded: wrong keys, wrong shapes, unreadable file."""


class ParityError(TokenFlowError):
    """A graph does not reproduce the reference it is checked against."""


class PromptError(TokenFlowError, ValueError):
    """A prompt is empty, or longer than the model allows."""


class PagesExhausted(TokenFlowError):  # noqa: N818 - the condition's name in the field
    """The pool of key/value pages is too small.

    Args:
        needed: pages asked for.
        free: pages that are free.
        total: pages in the pool.
    """

    def __init__(self, needed: int, free: int, total: int) -> None:
        super().__init__(
            f"{needed} key/value pages are needed, {free} of {total} are free.",
            f"{'Wait for requests to finish, ask' if needed <= total else 'Ask'} for fewer images, or open the model with "
            f"pages={total - free + needed} or more.",
        )
        self.needed, self.free, self.total = needed, free, total


class RequestTimeoutError(TokenFlowError, TimeoutError):
    """A request was not finished within its `timeout`, the time that it waited for others included."""

    __str__ = TokenFlowError.__str__


class RequestCancelledError(TokenFlowError):
    """A stream was closed before its end, and is read nevertheless, e.g. by a thread that was waiting for its next piece."""


class BackendError(TokenFlowError, RuntimeError):
    """A backend cannot start on this machine, or cannot load or run a graph."""


class EngineBuildError(BackendError):
    """TensorRT cannot build an engine from a graph."""


class EngineRefusedError(BackendError):
    """An engine does not reproduce its bundle's reference within the tolerances."""


class NotFiniteError(BackendError):
    """A model computed NaN or infinity for a request. Requests that ran beside it are not affected."""


class MissingPackageError(TokenFlowError, ImportError):
    """An optional package is not installed, or cannot be used; the hint is the `pip install` command."""


class OutputError(TokenFlowError, OSError):
    """A result cannot be written."""

    __str__ = TokenFlowError.__str__


class ColorProfileWarning(UserWarning):
    """A picture's colour profile cannot be applied; its colours are read as stored."""


class PreparationWarning(UserWarning):
    """Codes of a picture that was prepared otherwise than the language model that reads them expects."""
