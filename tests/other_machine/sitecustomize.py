"""Takes away what only Linux has, as on macOS and Windows: with this folder on PYTHONPATH, in each Python process.

vlm_sft and the recipes find no `fcntl` and no `resource`, but Windows' `msvcrt`; nobody finds `os.sched_getaffinity` or
an alarm. Workers start as START_METHOD says: spawn (macOS, Windows) or forkserver (Linux from Python 3.14 on).
"""

import builtins
import multiprocessing
import os
import signal
from types import SimpleNamespace

_import = builtins.__import__


def _lock(descriptor, mode, size):
    """As Windows locks; here on Linux's own calls, so that a second process is refused."""
    fcntl = _import("fcntl")
    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _import_elsewhere(name, globals=None, *rest, **options):
    ours = ((globals or {}).get("__name__") or "").split(".")[0] in ("vlm_sft", "__main__", "__mp_main__")
    if ours and name in ("fcntl", "resource"):
        raise ImportError(f"No module named {name!r}")
    if ours and name == "msvcrt":
        return SimpleNamespace(LK_NBLCK=2, locking=_lock)
    return _import(name, globals, *rest, **options)


builtins.__import__ = _import_elsewhere
del os.sched_getaffinity, signal.SIGALRM, signal.setitimer
multiprocessing.set_start_method(os.environ.get("START_METHOD", "spawn"))
