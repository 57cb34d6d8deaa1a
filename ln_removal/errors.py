"""The exceptions that a user is meant to see."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake, or a missing thing, that the user can correct.

    The message says what is wrong, what was found and what to do next, in one line. Commands print it and exit 2;
    anything else that escapes a command is a bug of ours and keeps its traceback.
    """


class DivergedError(UserError):
    """A training whose loss or gradient stopped being finite; of several trainings the others can go on."""
