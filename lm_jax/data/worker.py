"""What processes that work for this one have in common."""

import multiprocessing
import os
import signal
import threading


def begin(*ignored: signal.Signals) -> None:
    """Makes this process one that ends with its parent.

    Args:
      ignored: signals that are sent to a whole group of processes, and are the parent's affair.
    """
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)

    def follow_parent() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)  # killed outright, the parent could not tell its workers to stop

    threading.Thread(target=follow_parent, daemon=True).start()
