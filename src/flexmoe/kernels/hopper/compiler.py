"""CUDA C++ to machine code, by NVRTC. Enters: source, macros, a GPU's capability. Leaves: a cubin, kept for next time.

NVRTC and its bindings come with torch's builds for CUDA: no toolkit is needed.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexmoe.errors import FlexMoEError
from flexmoe.kernels.kept import cache_folder, digest, find, keep

_log = logging.getLogger(__name__)


def compiled(name: str, source: str, macros: Mapping[str, int | str], capability: tuple[int, int]) -> bytes:
    """The cubin of a source for one kind of GPU, from the user's cache or compiled. Raises FlexMoEError."""
    from cuda.bindings import nvrtc

    error, major, minor = nvrtc.nvrtcVersion()
    _check(nvrtc, error)
    options = options_for(macros, capability)
    name = f"{name}-{digest(chr(0).join([f'{major}.{minor}', *options, source]).encode())}"
    folder = cache_folder()
    try:
        if folder is not None and (file := find(folder, name, "cubin")) is not None:
            return file.read_bytes()
    except OSError as error:
        _log.info("%s cannot be read: %s", folder, error)
    cubin, _ = compile_now(name, source, options)
    if folder is not None:
        _write(folder, name, cubin)
    return cubin


def options_for(macros: Mapping[str, int | str], capability: tuple[int, int]) -> list[str]:
    """Of the compiler, for one kind of GPU and all of its instructions."""
    defined = [f"-D{key}={value}" for key, value in sorted(macros.items())]
    return [f"--gpu-architecture=sm_{capability[0]}{capability[1]}a", "-std=c++17", *defined]


def compile_now(name: str, source: str, options: list[str]) -> tuple[bytes, str]:
    """The cubin, and what the compiler had to say."""
    from cuda.bindings import nvrtc

    error, program = nvrtc.nvrtcCreateProgram(source.encode(), f"{name}.cu".encode(), 0, [], [])
    _check(nvrtc, error)
    try:
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = _text(nvrtc, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
        said = log.decode(errors="replace").strip("\0 \n")
        if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise FlexMoEError(f"NVRTC could not compile {name}: {said}")
        return _text(nvrtc, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), said
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _text(nvrtc: Any, size_of: Any, get: Any, program: Any) -> bytes:
    error, size = size_of(program)
    _check(nvrtc, error)
    data = bytes(size)
    (error,) = get(program, data)
    _check(nvrtc, error)
    return data


def _check(nvrtc: Any, error: Any) -> None:
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise FlexMoEError(f"NVRTC: {nvrtc.nvrtcGetErrorString(error)[1].decode()}")


def _write(folder: Path, name: str, cubin: bytes) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:
            built = Path(own) / "kernel.cubin"
            built.write_bytes(cubin)
            keep(built, folder, name)
    except OSError as error:
        _log.info("%s cannot hold the kernels for Hopper: %s", folder, error)
