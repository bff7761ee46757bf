"""llama.cpp behind the interface of engines.py, by its C functions. Enters: a GGUF file. Leaves: when tokens came.

Runs in the environment that has llama-cpp-python, which need have nothing else but numpy.
"""

from __future__ import annotations

import ctypes
import time
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from harness.engines import Timed

_BATCH = 2048  # tokens a call at most
_CONTEXT_UNIT = 256  # llama.cpp rounds the context of a sequence up to so many tokens
_QUIET = llama_cpp.llama_log_callback(lambda *_: None)


class LlamaCppEngine:
    """variant: {} for its defaults, or {"exact": True}: keys and values in fp32, and no flash attention."""

    def __init__(self, model: str, threads: int) -> None:
        llama_cpp.llama_log_set(_QUIET, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        self._model = llama_cpp.llama_model_load_from_file(model.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        self._threads = threads
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(_BATCH, 0, 1)
        self._context: tuple[tuple[int, int, bool], Any] | None = None

    def about(self) -> dict[str, Any]:
        system = llama_cpp.llama_print_system_info().decode()
        return {"llama-cpp-python": llama_cpp.__version__, "system": system, "threads": self._threads}

    def generate(self, prompts: list[list[int]], max_tokens: int, variant: dict[str, Any]) -> Timed:
        rows, length = len(prompts), len(prompts[0])
        context = self._context_for(rows, length + max_tokens, bool(variant.get("exact")))
        ids = np.array(prompts, np.int32)  # [B, prompt]
        start = time.monotonic()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        tokens = [self._prefill(context, ids)]
        first = time.monotonic()
        tokens += [self._step(context, tokens[-1][:, None], length)] if max_tokens > 1 else []
        for done in range(2, max_tokens):
            tokens.append(self._step(context, tokens[-1][:, None], length + done - 1))
        end = time.monotonic()
        return Timed(first - start, end - start, np.stack(tokens, 1).tolist())

    def _prefill(self, context: Any, ids: NDArray[np.int32]) -> NDArray[np.int32]:
        """As many whole prompts a call as fit."""
        some = max(1, _BATCH // ids.shape[1])
        return np.concatenate(
            [self._step(context, ids[at : at + some], 0, first_row=at) for at in range(0, len(ids), some)]
        )

    def _step(self, context: Any, ids: NDArray[np.int32], position: int, first_row: int = 0) -> NDArray[np.int32]:
        """Run ids [B, T] at `position`; the likeliest token behind each row [B]."""
        rows, length = ids.shape
        count = rows * length
        batch = self._batch
        batch.n_tokens = count
        _view(batch.token, count)[:] = ids.ravel()
        _view(batch.pos, count)[:] = np.tile(np.arange(position, position + length, dtype=np.int32), rows)
        _view(batch.n_seq_id, count)[:] = 1
        wanted = _view(batch.logits, count)
        wanted[:] = 0
        wanted[length - 1 :: length] = 1
        for place in range(count):
            batch.seq_id[place][0] = first_row + place // length
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), (rows, self._vocab))
        return logits.argmax(1).astype(np.int32)

    def _context_for(self, rows: int, length: int, exact: bool) -> Any:
        """Exactly as large as this load needs, each sequence with a part of its own."""
        length = -(-length // _CONTEXT_UNIT) * _CONTEXT_UNIT
        key = (rows, length, exact)
        if self._context is not None and self._context[0] == key:
            return self._context[1]
        if self._context is not None:
            llama_cpp.llama_free(self._context[1])
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = rows * length, rows
        params.n_batch = _BATCH
        params.n_threads = params.n_threads_batch = self._threads
        if exact:
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        context = llama_cpp.llama_init_from_model(self._model, params)
        if not context:
            raise RuntimeError(f"llama.cpp cannot make a context of {rows} x {length} tokens")
        self._context = key, context
        return context


def _view(pointer: Any, count: int) -> NDArray[Any]:
    return np.ctypeslib.as_array(pointer, (count,))
