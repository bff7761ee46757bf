"""Hugging Face transformers' plain `generate`, in a process of its own. Enters: lines of JSON. Leaves: lines of JSON.

This module is that process' program and imports nothing of the server. Its argument is a JSON object: folder, dtype,
device, threads, eos_token_ids. On stdin come {"id", "token_ids", "max_tokens", "ignore_eos"} and {"stop": id}. On
stdout go {"ready"} with the memory used, {"id", "token"} for each token, {"id", "done"} at the end of an answer, and
{"error"} for what fails. The end of stdin is its end.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any, TextIO

import torch

_WARM_UP = {
    "id": None,
    "token_ids": [1, 2, 3, 4],
    "max_tokens": 2,
    "ignore_eos": True,
}  # what a first answer alone would pay for


class Generator:
    """The model and its answers."""

    def __init__(self, setup: dict[str, Any], out: TextIO) -> None:
        import transformers

        transformers.utils.logging.set_verbosity_error()
        self._transformers, self._out = transformers, out
        self._device = torch.device(setup["device"])
        self._eos: list[int] | None = setup["eos_token_ids"] or None
        if self._device.type == "cpu":
            torch.set_num_threads(setup["threads"])
        model = transformers.AutoModelForCausalLM.from_pretrained(
            setup["folder"], dtype=getattr(torch, setup["dtype"]), local_files_only=True
        )
        self._model: Any = model.to(self._device).eval()
        # In place of the model's own, which may ask for sampling or penalties.
        self._model.generation_config = transformers.GenerationConfig(
            do_sample=False, eos_token_id=None, pad_token_id=0
        )
        self.stopped: set[int] = set()

    def ready(self) -> None:
        """Warm up, and say so."""
        self.answer(_WARM_UP)
        self.tell({"ready": True, "version": self._transformers.__version__, "memory_bytes": self._memory()})

    @torch.inference_mode()
    def answer(self, question: dict[str, Any]) -> None:
        """Generate, telling each token as it comes."""
        number = question["id"]
        ids = torch.tensor([question["token_ids"]], device=self._device)  # [1, prompt]
        self._model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=question["max_tokens"],
            eos_token_id=None if question["ignore_eos"] else self._eos,
            streamer=_Streamer(self, number),
            stopping_criteria=[lambda rows, _: torch.full((len(rows),), number in self.stopped, device=rows.device)],
        )
        if number is not None:
            self.tell({"id": number, "done": True, "memory_bytes": self._memory()})

    def tell(self, line: dict[str, Any]) -> None:
        """One line to the server."""
        self._out.write(json.dumps(line) + "\n")
        self._out.flush()

    def _memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_reserved(self._device)
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")


class _Streamer:
    """What `generate` hands its tokens to: first the prompt, then each new one."""

    def __init__(self, generator: Generator, number: int | None) -> None:
        self._generator, self._number, self._begun = generator, number, False

    def put(self, tokens: torch.Tensor) -> None:
        if self._begun and self._number is not None:
            self._generator.tell({"id": self._number, "token": int(tokens.reshape(-1)[0])})
        self._begun = True

    def end(self) -> None:
        """All were told."""


def main() -> None:
    """Answer until stdin ends."""
    out = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        generator = Generator(json.loads(sys.argv[1]), out)
        generator.ready()
    except Exception as error:  # noqa: BLE001 - the server tells whoever asked
        out.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        out.flush()
        return
    questions: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(generator, questions), daemon=True).start()
    while True:
        question = questions.get()
        try:
            generator.answer(question)
        except Exception as error:  # noqa: BLE001 - the server tells whoever asked
            generator.tell({"id": question["id"], "error": f"{type(error).__name__}: {error}"})


def _read(generator: Generator, questions: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Questions, and wishes to stop one that is being answered."""
    for line in sys.stdin:
        message = json.loads(line)
        if "stop" in message:
            generator.stopped.add(message["stop"])
        else:
            questions.put(message)
    os._exit(0)  # the server is gone, whatever is being generated


if __name__ == "__main__":
    main()
