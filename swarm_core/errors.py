"""The two roots of this project's errors. Every error a person may see has a `str()` of one readable line."""

from __future__ import annotations


class KedgeError(Exception):
    """Something went wrong that is not a bug: a peer went away, a stream broke. A command ends with exit code 1."""


class UserError(KedgeError):
    """Something the person at the keyboard can mend: a file, a flag, an address. A command ends with exit code 2."""
