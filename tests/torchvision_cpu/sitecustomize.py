"""Lets recipes and tests import torchvision beside a CPU-only torch.

The common torchvision wheel is a CUDA build. Beside a CPU-only torch its compiled operators do not load, and
`import torchvision` fails with "operator torchvision::nms does not exist". The image and video processors of
transformers call none of these operators: to declare the two that torchvision's own modules name is enough.

`make` copies it into .venv as a module that Python imports at start. The tests put its folder on PYTHONPATH, so that
launched processes get it too. A torchvision installed with `pip install --target <sys.prefix>/test-only torchvision` is
found after all others.

bitsandbytes 0.50 warns on some CPUs, at import, that an optional package is missing: that reads like a broken install
and is none, so it is left out.
"""

import contextlib
import importlib.abc
import logging
import sys
from pathlib import Path

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_libraries = []  # the operators live as long as their library object


class _DeclareOperators(importlib.abc.MetaPathFinder):
    """Acts when torchvision is first looked for: importing torch in every Python process would cost seconds."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision" and self in sys.meta_path:
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None and not self._has_operators(torch):
                _libraries.append(torch.library.Library("torchvision", "DEF"))
                for schema in _SCHEMAS:
                    _libraries[-1].define(schema)
        return None

    @staticmethod
    def _has_operators(torch):
        """True where they are declared already, or where torchvision was built for this torch and brings them."""
        binaries = [Path(folder, "torchvision", "_C.so") for folder in sys.path]
        with contextlib.suppress(OSError, StopIteration):
            torch.ops.load_library(next(binary for binary in binaries if binary.is_file()))
        return hasattr(torch.ops.torchvision, "nms")


_test_only = str(Path(sys.prefix, "test-only"))
if Path(_test_only).is_dir() and _test_only not in sys.path:
    sys.path.append(_test_only)
sys.meta_path.insert(0, _DeclareOperators())
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))
