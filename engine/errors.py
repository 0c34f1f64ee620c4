"""The one exception that users see: a single line that says what is wrong, where, and the way out."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend. Command lines print it as one line and exit with code 2.

    ``where`` names the file, field, row or rank; ``fix`` is the way out. Both end up in the message.
    """

    exit_code = 2

    def __init__(self, problem: str, *, where: str | None = None, fix: str | None = None):
        message = f"{where}: {problem}" if where else problem
        if fix:
            message = f"{message.rstrip('.')}. {fix}"
        super().__init__(" ".join(message.split()))


class Interrupted(UserError):
    """Work that was stopped from outside: what was finished is kept, and the same command goes on from there."""
