"""The end of a process group in a process that goes on."""

import time

from torch import distributed


def leave_group() -> None:
    """Destroy the group, once its threads have let go of what they hold.

    PyTorch 2.13 keeps the interpreter's lock while it waits for gloo's threads, and one that still
    lets go of a DDP reduction needs it: both then wait forever. Sleeping gives the lock away.
    """
    time.sleep(0.2)
    distributed.destroy_process_group()
