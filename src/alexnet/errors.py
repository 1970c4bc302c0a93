"""The one exception a user is meant to read."""


class UserError(ValueError):
    """Something the user can put right: one line that says what, which value, which key, and what to do.

    Scripts print the line on stderr and exit with code 2 (`alexnet.cli.command`).
    """
