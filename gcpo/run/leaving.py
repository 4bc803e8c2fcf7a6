"""How a process of several ends, once its work is done."""

import atexit
import os
import sys
import threading
from typing import NoReturn


def leave(code: int = 0) -> NoReturn:
    """
    End this process without the interpreter's own end, as `multiprocessing` ends the processes that it starts.

    The threads of a gloo group outlive `torch.distributed.destroy_process_group` for as long as anything refers to the
    group, as DistributedDataParallel and the default arguments of `torch.distributed.nn` do. One of them that has yet
    to release a tensor waits for the interpreter's lock, and where the interpreter ends meanwhile, it aborts the
    process ("terminate called without an active exception"). The launcher then stops the others, which may be saving.

    Args:
        code: the exit code.
    """
    # What the interpreter's end does before the point at which other threads can no longer have the lock.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
