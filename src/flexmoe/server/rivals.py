"""The engines that ours may be compared with: transformers in a process of its own, or an OpenAI endpoint."""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import logging
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

from flexmoe.config.packing import Packing
from flexmoe.config.sampling import SamplingParams
from flexmoe.config.server import ServerConfig
from flexmoe.engine.detokenizer import Detokenizer
from flexmoe.engine.engine import Engine
from flexmoe.errors import ConfigError, MissingDependencyError
from flexmoe.server.endpoint import Endpoint
from flexmoe.server.errors import APIError
from flexmoe.server.rival import Question, Rival, Times
from flexmoe.server.stream import event_of

_log = logging.getLogger("flexmoe.server")


def rival_of(config: ServerConfig, engine: Engine) -> Rival | None:
    """What `--compare` asks for. Raises ConfigError, MissingDependencyError."""
    if config.compare is None:
        return None
    if config.compare != "hf":
        return Endpoint(config.compare, config.compare_key)
    if importlib.util.find_spec("transformers") is None:
        raise MissingDependencyError("transformers", "hf", "flexmoe serve --compare hf")
    folder = engine.model_folder
    if folder is None or engine.tokenizer is None:
        raise ConfigError("compare='hf' needs a model with weights and a tokenizer in a folder; leave it out.")
    if Packing.read(json.loads((folder / "config.json").read_text(encoding="utf-8"))) is not None:
        raise ConfigError(f"compare='hf': transformers cannot read the quantized weights of {folder}; leave it out.")
    return HuggingFace(engine, folder)


class HuggingFace:
    """Plain `generate` with our folder, dtype, device and threads; started by the first question."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        about = engine.describe()
        self._engine = engine
        self._setup = {
            "folder": str(folder),
            "eos_token_ids": list(engine.config.eos_token_ids),
            **{name: about[name] for name in ("dtype", "device", "threads")},
        }
        self._process: Process | None = None
        self._ready: dict[str, Any] = {}
        self._turn = asyncio.Lock()
        self._numbers = itertools.count()

    def about(self) -> dict[str, str]:
        how = f"{self._setup['dtype']} on {self._setup['device']}"
        return {"kind": "hf", "name": f"Hugging Face transformers, generate, {how}"}

    async def answer(self, question: Question) -> AsyncIterator[bytes]:
        yield event_of({"state": "waiting"}, name="status")
        async with self._turn:
            yield event_of({"state": "loading"}, name="status")
            process = await self._started()
            memory = self._ready["memory_bytes"]
            yield event_of({"state": "ready", "memory_bytes": memory}, name="status")
            number = next(self._numbers)
            wanted = {"max_tokens": question.max_tokens, "ignore_eos": question.ignore_eos}
            _send(process, {"id": number, "token_ids": list(question.token_ids), **wanted})
            try:
                async for event in self._chunks(process, number, question):
                    yield event
            finally:
                _send(process, {"stop": number})

    async def close(self) -> None:
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def _started(self) -> Process:
        if self._process is None or self._process.returncode is not None:
            command = [sys.executable, "-m", "flexmoe.server.hugging_face", json.dumps(self._setup)]
            self._process = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE)
            self._ready = {}
        while not self._ready:  # if whoever asked first left meanwhile, the line is still to come
            line = await _line(self._process)
            self._ready = line if "ready" in line else {}
        return self._process

    async def _chunks(self, process: Process, number: int, question: Question) -> AsyncIterator[bytes]:
        tokenizer = self._engine.tokenizer
        assert tokenizer is not None
        text = Detokenizer(tokenizer, question.token_ids, SamplingParams())
        count, finish, times = 0, "length", Times(time.monotonic())
        while True:
            line = await _line(process)
            if line.get("id") != number:  # of a question that nobody waits for any more
                continue
            if "done" in line:
                break
            count += 1
            times.token(time.monotonic())
            if not question.ignore_eos and line["token"] in self._engine.config.eos_token_ids:
                finish = "stop"
            elif piece := text.append([line["token"]]):
                yield _chunk(piece)
        yield _chunk(text.flush(), finish)
        yield event_of({"state": "over", "memory_bytes": line["memory_bytes"]}, name="status")
        prompt = len(question.token_ids)
        tokens = {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}
        yield event_of({"choices": [], "usage": tokens, "timings": times.told(count)})


async def _line(process: Process) -> dict[str, Any]:
    """The next line that is no error. Raises APIError for one that is, and if the process has ended."""
    assert process.stdout is not None
    text = await process.stdout.readline()
    if not text:
        raise APIError(503, "the process of transformers has ended; the server's log may say why.", code="rival_failed")
    line: dict[str, Any] = json.loads(text)
    if "error" in line:
        _log.error("transformers failed", extra={"fields": {"error": line["error"]}})
        raise APIError(503, f"transformers failed: {line['error']}", code="rival_failed")
    return line


def _send(process: Process, message: Mapping[str, Any]) -> None:
    if process.stdin is not None and not process.stdin.is_closing():
        process.stdin.write(json.dumps(message).encode() + b"\n")


def _chunk(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": finish}
    return event_of({"object": "chat.completion.chunk", "choices": [choice]})
