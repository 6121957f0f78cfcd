"""Errors raised by quantkit_runtime.

::

    QuantkitRuntimeError
    |-- CheckpointFormatError     the files on disk are not a checkpoint this runtime understands
    |-- BackendUnavailableError   the requested kernel backend or compute mode cannot run here
    |-- ParallelError             several ranks cannot run, or no longer run, one generation
    `-- MissingDependencyError    an optional package is needed and not installed

Every message is one line that names the file or key at fault and what to do about it.
"""


class QuantkitRuntimeError(Exception):
    """Base of every error that quantkit_runtime raises on purpose."""


class CheckpointFormatError(QuantkitRuntimeError):
    """A checkpoint's files or metadata are missing, damaged, contradictory or of an unknown format."""


class BackendUnavailableError(QuantkitRuntimeError):
    """The kernel backend or compute mode that was asked for cannot serve this layer on this machine."""


class ParallelError(QuantkitRuntimeError):
    """Several ranks cannot run one generation together, or have stopped doing the same."""


class MissingDependencyError(QuantkitRuntimeError):
    """An optional dependency is not installed; the message names the pip command that installs it."""
