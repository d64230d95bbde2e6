"""The user's mistakes, said in words."""


class UserError(Exception):
    """A mistake of the user's: a file, a line, a field or an option, said in a line or a few."""
