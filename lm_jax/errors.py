"""What goes wrong, and the exit statuses by which launch scripts know what to do about it.

0      done
1      something is wrong that starting again does not mend: `UserError`, or a defect of lm_jax
75     what starting again mends: `Interrupted`
128+N  ended by signal N; a run has saved then, if it had done a step
"""

import reprlib

WRONG = 1
AGAIN = 75  # EX_TEMPFAIL of sysexits.h


_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 200
_shorten.maxlevel, _shorten.maxlist, _shorten.maxtuple = 3, 50, 50
_QUOTED = 500  # characters


def shown(value: object) -> str:
    """`value` for a message: quoted, and cut where it is long."""
    return cut(_shorten.repr(value), _QUOTED)


def cut(text: str, most: int) -> str:
    """`text` for a message, which may quote what is long."""
    return text if len(text) <= most else text[:most] + " ..."


def ended_by(number: int) -> int:
    """The exit status of a process that a signal ended, as shells have it."""
    return 128 + number


class UserError(Exception):
    """Something the user can mend: the message says what was wrong, where, and what to do.

    Entry points print the message alone and exit with `status`; anything else that is raised is a
    defect of lm_jax and keeps its traceback.
    """

    status = WRONG


class Interrupted(UserError):
    """Nothing to mend: another process of the job was lost, say, or a store could not be reached.
    The same command goes on, and launch scripts give it again."""

    status = AGAIN
