"""Triton's interpreter, four times as fast: what it makes anew in every call or operation is made once.

It changes nothing that a kernel computes. Imported before the first launch, by the tests and by the ranks that they
start; on a GPU, where kernels are compiled, nothing is changed. It leans on names of Triton 3.6: other versions are
left as they are.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any


def hasten() -> None:
    """Change the interpreter of this process, if kernels run in it. Again, it does nothing."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    import triton
    from triton.runtime import interpreter

    if triton.__version__.startswith("3.6.") and not hasattr(interpreter._patch_lang, "__wrapped__"):
        interpreter._patch_lang = _once_a_language(interpreter._patch_lang, interpreter.tl)
        interpreter._get_np_dtype = _once_a_name(interpreter._get_np_dtype)
        _type_when_asked(interpreter.tl.core)
        _shapes_once(interpreter.tl.core)
        # It does each sum of integers a second time, in 64 bits, and says nothing of an overflow unless it debugs.
        builder = interpreter.interpreter_builder
        builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _once_a_language(patch: Callable[..., Any], language: Any) -> Callable[..., Any]:
    """Patches triton.language for good, instead of for each launch and call: such a process only interprets."""
    done: set[tuple[bool, ...]] = set()
    kept = SimpleNamespace(restore=lambda: None)

    @functools.cache
    def languages(function: Any) -> tuple[bool, ...]:
        seen = [id(value) for value in function.__globals__.values()]
        return id(language) in seen, id(language.core) in seen

    @functools.wraps(patch)
    def once(function: Any) -> Any:
        if languages(function) not in done:
            patch(function)
            done.add(languages(function))
        return kept

    return once


def _once_a_name(find: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """numpy's type of a triton type, which may be a pointer and not hashable."""
    found: dict[str, Any] = {}

    def once(dtype: Any) -> Any:
        if dtype.name not in found:
            found[dtype.name] = find(dtype)
        return found[dtype.name]

    return once


def _type_when_asked(core: Any) -> None:
    """Every shape is a tuple of the language's own, with a type and its name, which hardly anybody asks for."""

    def init(self: Any, args: Any, given: Any = None) -> None:
        self.values, self._type = list(args), given

    def type_of(self: Any) -> Any:
        if self._type is None:
            self._type = core._type_for_tuple_values(self.values)
        elif not isinstance(self._type, core.tuple_type):
            self._type = core.tuple_type(self._type)
        return self._type

    def retype(self: Any, given: Any) -> None:
        self._type = given

    core.tuple.__init__, core.tuple.type = init, property(type_of, retype)


def _shapes_once(core: Any) -> None:
    """Blocks of one shape have one type, and tensors of one type one shape: neither ever changes."""
    types: dict[tuple[Any, ...], dict[str, Any]] = {}
    shapes: dict[str, tuple[Any, Any]] = {}
    block, tensor = core.block_type.__init__, core.tensor.__init__

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(getattr(size, "value", size) for size in shape))
        if key not in types:
            block(self, element_ty, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key])

    def init_tensor(self: Any, handle: Any, given: Any) -> None:
        if given.name not in shapes:
            tensor(self, handle, given)
            shapes[given.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, given, given.scalar
        self.shape, self.numel = shapes[given.name]

    core.block_type.__init__, core.tensor.__init__ = init_block, init_tensor
