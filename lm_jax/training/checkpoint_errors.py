"""What is wrong with a checkpoint, or with the store that it is in."""

from lm_jax.errors import Interrupted, UserError

# What orbax, tensorstore and the system raise where a store does not take or give what it should.
STORE = (OSError, ValueError, RuntimeError)
# What stores say, by way of tensorstore, where they may answer later.
_LATER = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "Connection", "timed out")


class Damaged(UserError):
    """A checkpoint that is not what was saved."""


class OtherModel(Damaged):
    """A checkpoint of another model: in a run's own workdir, whose config says what it is, that is
    damage as well."""


class Unsaved(UserError):
    """A checkpoint that could not be saved. Those before it are there as they were."""


_KINDS = (UserError, Interrupted, Damaged, OtherModel, RuntimeError)


def said(error: Exception) -> str:
    """The first line of an error, or what it is called."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def damaged(what: str, why: str) -> Damaged:
    return Damaged(f"{what} is damaged, or of another optimizer ({why})")


def why_unreadable(error: Exception, what: str) -> list[str]:
    """What an error in reading means, in a form that processes can tell each other; see `error_of`.

    Args:
      what: was read, for the message.
    """
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return ["RuntimeError", f"RESOURCE_EXHAUSTED: {said(error)}"]
    if isinstance(error, PermissionError) or "PERMISSION_DENIED" in str(error):
        return ["UserError", f"{what} may not be read: {said(error)}"]
    if any(word in str(error) for word in _LATER):
        return ["Interrupted", f"{what} cannot be read now: {said(error)}"]
    return ["Damaged", str(damaged(what, said(error)))]


def error_of(told: list[str]) -> Exception:
    """The error whose kind and message are told."""
    return next(kind for kind in _KINDS if kind.__name__ == told[0])(told[1])
