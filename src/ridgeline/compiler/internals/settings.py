"""Inductor's and Dynamo's own settings, read or changed for a while. Used by the accuracy check, the doctor, the caches.

Private names used (read in torch 2.11 to 2.13): ``torch._inductor.config.patch``,
``torch._inductor.runtime.cache_dir_utils.default_cache_dir``, ``torch._dynamo.config.suppress_errors``, the backend
``aot_eager``, and Dynamo's callbacks and counters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from ridgeline.compiler.internals import check_version

_VERSION = check_version("the compiler room")

from torch._dynamo.callback import CallbackArgs, callback_handler  # noqa: E402
from torch._dynamo.utils import counters, get_compilation_metrics  # noqa: E402

__all__ = [
    "CallbackArgs",
    "aot_eager",
    "callback_handler",
    "counters",
    "default_cache_folder",
    "get_compilation_metrics",
    "inductor_options",
    "suppresses_errors",
]


def inductor_options(options: Mapping[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """Inductor's settings as given while the ``with`` block runs."""
    from torch._inductor import config

    changed: contextlib.AbstractContextManager[Any] = config.patch(dict(options))
    return changed


def default_cache_folder() -> str:
    """Where Inductor keeps its cache when TORCHINDUCTOR_CACHE_DIR does not say."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    return str(default_cache_dir())


def suppresses_errors() -> bool:
    """Whether Dynamo answers a backend's exception by running eager."""
    import torch._dynamo

    return bool(torch._dynamo.config.suppress_errors)


def aot_eager(gm: Any, inputs: Any) -> Any:
    """AOTAutograd, and then every operator in eager."""
    from torch._dynamo.backends.debugging import aot_eager as backend

    return backend(gm, inputs)
