"""How a process of several ends, once its work is done."""

import atexit
import gc
import io
import os
import threading
from contextlib import suppress
from typing import NoReturn


def leave(code: int = 0) -> NoReturn:
    """
    End this process without the interpreter's own end, as `multiprocessing` ends the processes that it starts.

    The threads of a gloo group outlive `torch.distributed.destroy_process_group` for as long as anything refers to the
    group, as DistributedDataParallel and the default arguments of `torch.distributed.nn` do. One of them that has yet
    to release a tensor waits for the interpreter's lock, and where the interpreter ends meanwhile, it aborts the
    process ("terminate called without an active exception"). The launcher then stops the others, which may be saving.

    Threads are waited for, exit handlers run, and open files are flushed; modules and what they hold are not taken
    apart. To be called from the main thread, by what owns the process.

    Args:
        code: the exit code.
    """
    try:
        # What the interpreter's end does before the point at which other threads can no longer have its lock.
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for file in gc.get_objects():  # standard output and error among them
            if isinstance(file, io.TextIOWrapper | io.BufferedWriter | io.BufferedRandom):
                with suppress(ValueError, OSError):  # closed, or full
                    file.flush()
    finally:
        os._exit(code)
