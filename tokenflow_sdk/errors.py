"""Every exception the SDK raises for a reason a user can mend.

    TokenFlowError
    ├── ArgumentError            an option or argument has a value that cannot work
    ├── ImageError               a picture cannot be used
    │   ├── ImageReadError       no such file, a directory, no permission, an unreadable file object
    │   ├── CorruptImageError    empty, truncated, or not a picture at all
    │   ├── ImageTooLargeError   more pixels than allowed (decompression bomb)
    │   └── ImageShapeError      too long and thin, or an array of the wrong size
    ├── ArrayError               an array has the wrong dtype or rank, or holds NaN
    ├── CodesError               code indices cannot be used
    │   ├── CodesReadError       no such file, or it cannot be read
    │   ├── CorruptCodesError    not a .tfc file, a bad checksum, cut inside a scale
    │   ├── CodesRangeError      an index outside the codebook, or a length that is no whole scale
    │   └── CodebookMismatchError  codes made with another codebook than the bundle's
    ├── BundleError              a bundle cannot be used
    │   ├── BundleNotFoundError  no bundle at that path or id
    │   ├── BundleKindError      a bundle of another kind, e.g. a generator where a tokenizer is needed
    │   ├── CorruptBundleError   a file is missing or its hash or I/O differs from bundle.json
    │   └── BundleVersionError   written for a newer SDK than this one
    ├── CheckpointError          a released checkpoint cannot be loaded (export only)
    ├── ParityError              an exported or stored graph does not reproduce its reference
    ├── PromptError              a prompt is empty or too long
    ├── PagesExhausted           the pool of key/value pages is too small for what was asked
    ├── BackendError             the engine refused to load or run a graph
    │   ├── EngineBuildError     TensorRT cannot build an engine from a graph
    │   └── EngineRefusedError   an engine does not reproduce its bundle's reference
    ├── MissingPackageError      an optional package is not installed
    └── OutputError              a result cannot be written (read-only, disk full, exists)

Each carries two sentences: `message` names the thing and says why, `hint` says what to do about it. Both are in `str(error)`.
Mistakes inside the SDK itself are not in this tree: those surface as ordinary Python exceptions and are bugs.
"""

from __future__ import annotations

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
    "CorruptBundleError",
    "CorruptCodesError",
    "CorruptImageError",
    "EngineBuildError",
    "EngineRefusedError",
    "ImageError",
    "ImageReadError",
    "ImageShapeError",
    "ImageTooLargeError",
    "MissingPackageError",
    "OutputError",
    "PagesExhausted",
    "ParityError",
    "PromptError",
    "TokenFlowError",
]


class TokenFlowError(Exception):
    """Base of every error a user can mend.

    Args:
        message: One sentence that names the thing and says what is wrong with it.
        hint: One sentence with the command, argument or step that mends it.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message, hint)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}"


class ArgumentError(TokenFlowError, ValueError):
    """An option or argument has a value that cannot work."""


class ImageError(TokenFlowError):
    """A picture cannot be used."""


class ImageReadError(ImageError, OSError):
    """The picture's file does not exist, is a directory, or cannot be read."""

    __str__ = TokenFlowError.__str__


class CorruptImageError(ImageError):
    """The bytes are empty, cut short, or no picture."""


class ImageTooLargeError(ImageError):
    """The picture has more pixels than allowed."""


class ImageShapeError(ImageError):
    """The picture's sides cannot be used: too long and thin, or not the size a bundle takes."""


class ArrayError(TokenFlowError, ValueError):
    """An array has the wrong dtype or rank, or holds values that are not finite."""


class CodesError(TokenFlowError):
    """Code indices cannot be used."""


class CodesReadError(CodesError, OSError):
    """A file of codes does not exist, is a directory, or cannot be read."""

    __str__ = TokenFlowError.__str__


class CorruptCodesError(CodesError):
    """A file is not a `.tfc` file, fails its checksum, or ends inside a scale."""


class CodesRangeError(CodesError, ValueError):
    """An index lies outside the codebook, or the number of codes is no whole number of scales."""


class CodebookMismatchError(CodesError):
    """The codes were made with another codebook."""


class BundleError(TokenFlowError):
    """A bundle cannot be used."""


class BundleNotFoundError(BundleError):
    """There is no bundle at that path, name or hub id."""


class BundleKindError(BundleError):
    """The bundle is of another kind than was asked for."""


class CorruptBundleError(BundleError):
    """A bundle's file is missing, or differs from what `bundle.json` says."""


class BundleVersionError(BundleError):
    """The bundle was written for a newer SDK."""


class CheckpointError(TokenFlowError):
    """A checkpoint cannot be loaded: wrong keys, wrong shapes, unreadable file."""


class ParityError(TokenFlowError):
    """A graph does not reproduce the reference it is checked against."""


class PromptError(TokenFlowError, ValueError):
    """A prompt is empty, or longer than the model takes."""


class PagesExhausted(TokenFlowError):  # noqa: N818 - the condition's name in the field
    """The pool of key/value pages is too small.

    Args:
        needed: pages that were asked for.
        free: pages that were free.
        total: pages in the pool.
    """

    def __init__(self, needed: int, free: int, total: int) -> None:
        super().__init__(
            f"{needed} key/value pages are needed, {free} of {total} are free.",
            f"Wait for requests to finish, ask for fewer images, or open the model with pages={total - free + needed} or more.",
        )
        self.needed, self.free, self.total = needed, free, total

    def __reduce__(self) -> tuple[type[PagesExhausted], tuple[int, int, int]]:
        return type(self), (self.needed, self.free, self.total)


class BackendError(TokenFlowError, RuntimeError):
    """The inference engine refused to load or run a graph."""


class EngineBuildError(BackendError):
    """TensorRT cannot build an engine from a graph."""


class EngineRefusedError(BackendError):
    """An engine was compared with its bundle's reference and missed a bar."""


class MissingPackageError(TokenFlowError, ImportError):
    """An optional package is not installed; the hint is the `pip install` line."""


class OutputError(TokenFlowError, OSError):
    """A result cannot be written."""

    __str__ = TokenFlowError.__str__
