"""The one exception whose message is meant for the user."""


class UserError(Exception):
    """Something the user can mend: the message says what was wrong, where, and what to do.

    Entry points print the message alone and exit with status 1; anything else that is raised is a
    defect of lm_jax and keeps its traceback.
    """
