"""Keys under which Triton keeps our kernels, the same in every process.

Triton hashes a kernel, and the functions that it calls, when it is first launched. What a function adds to its caller's
hash depends on whether it was hashed itself before (seen in Triton 3.6, whose `_update_hash` takes over a function's
constants before it looks for them). So a kernel would have one key or another by what else was launched first, and what
one process compiled another might not find. Hashing all in a fixed order beforehand gives each one key.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from triton.runtime.jit import JITCallable

from flexmoe.kernels import triton as kernels


@functools.cache
def fix_cache_keys() -> None:
    """To be called before the first launch."""
    for module in sorted(found.name for found in pkgutil.iter_modules(kernels.__path__)):
        for _, value in sorted(vars(importlib.import_module(f"{kernels.__name__}.{module}")).items()):
            if isinstance(value, JITCallable):
                _ = value.cache_key
