"""Triton's cache keys of all our kernels, asked for in one order or the other. Leaves: a JSON line, by kernel.

    python -m tests.kernels.cache_keys forwards|backwards

Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import sys

import torch
from triton.runtime.jit import JITFunction

from flexmoe.kernels import triton as kernels
from tests.kernels.unforeseen_launches import MIXED, Engine


def main() -> None:
    with torch.inference_mode():
        Engine(MIXED, 0.0)  # as in every process that launches
    names = [f"{kernels.__name__}.{found.name}" for found in pkgutil.iter_modules(kernels.__path__)]
    found = [value for name in names for value in vars(importlib.import_module(name)).values()]
    functions = [value for value in found if isinstance(value, JITFunction)]
    functions = functions[::-1] if sys.argv[1] == "backwards" else functions
    keys = {f"{function.module}:{function.fn.__name__}": function.cache_key for function in functions}
    sys.stdout.write(json.dumps(keys, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
