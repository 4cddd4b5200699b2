"""One tree of exceptions. Each message says what, where, what was expected and what to do.

The command line prints the message and ends with the class's `exit_code`; a traceback is shown
only with ``--debug``.
"""

from __future__ import annotations


class EinfoldError(Exception):
    """Root of everything that einfold raises on purpose."""

    exit_code = 1


class ModelError(EinfoldError):
    """The model folder, its config or its weights cannot be used as they are."""

    exit_code = 3


class UnsupportedError(EinfoldError):
    """Well-formed input that einfold has no lowering for; names the layer and the reason."""

    exit_code = 4


class ArtifactError(EinfoldError):
    """An artifact is damaged, of a newer format, or would leave its folder."""

    exit_code = 5


class OutputError(EinfoldError):
    """The output exists, cannot be written, or the disk is full."""

    exit_code = 6


class RecipeError(EinfoldError):
    """A recipe or an option has an unknown key or an impossible value."""

    exit_code = 7


class PromptError(EinfoldError):
    """The prompt does not fit: too long for the context, or a token id out of range."""

    exit_code = 8


class IRError(EinfoldError):
    """The graph breaks a rule of the IR, or its textual form does not parse."""

    exit_code = 9


class CalibrationError(EinfoldError):
    """The calibration text is missing or too short, or the model gives no finite numbers on it."""

    exit_code = 10


class ArtifactWarning(UserWarning):
    """Something that an artifact brings is passed over; says what and why."""
