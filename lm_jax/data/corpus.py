"""By what it is noticed that a corpus has changed between two starts of a run."""

import hashlib
from collections.abc import Sequence
from typing import Any

from lm_jax.data.sources import Document, digest
from lm_jax.errors import UserError

_SAMPLE = 8  # documents of each source that are read

Fingerprint = dict[str, Any]


def fingerprint(sources: Sequence[Sequence[Document]]) -> Fingerprint:
    """How many documents each source has, and a sum of some of them from all over it.

    What changes neither is not noticed: to read all of a corpus would take hours.
    """
    sample = hashlib.sha256()
    for documents in sources:
        for i in range(min(_SAMPLE, len(documents))):
            try:
                document = documents[i * len(documents) // _SAMPLE]
            except UserError:  # is raised where it is trained on
                continue
            if document:  # else it was skipped
                sample.update(digest([document]).encode())
    return {"documents": [len(documents) for documents in sources], "sample": sample.hexdigest()}


def changes(before: Fingerprint | None, now: Fingerprint) -> str:
    """What is different, for a message, or ''.

    Args:
      before: None: it is not known.
    """
    if before is None or before == now:
        return ""
    if before.get("documents") != now["documents"]:
        then, now_ = (" + ".join(f"{n:,}" for n in x["documents"]) for x in (before, now))
        return f"the training text has changed ({then} documents, and now {now_})"
    return "the training text has changed (it has as many documents, and others)"
