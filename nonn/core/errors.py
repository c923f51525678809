"""The one exception that a user is meant to read."""


class UserError(Exception):
    """Something the user can mend: says what is wrong, where (file and key), and what to do."""
