"""LLM and SSM: FlexFlow's model objects over `flexmoe.LLM`. Enters: FlexFlow's arguments. Leaves: GenerationResult.

A translation and nothing else: names become options (translate.py), lengths become max_tokens (lengths.py), outputs
become results. Models are compiled and closed independently; several live side by side in one process.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from flexmoe.errors import RequestError
from flexmoe.serve import checkpoints, lengths, record
from flexmoe.serve.errors import (
    NotCompiledError,
    NotServedError,
    UnknownArgumentError,
    WrongPromptError,
    WrongTypeError,
)
from flexmoe.serve.requests import NO_ADAPTERS, GenerationConfig, GenerationResult, Request
from flexmoe.serve.server import Server
from flexmoe.serve.settings import DEFAULTS, DEGREES, process
from flexmoe.serve.translate import Limits, data_type_name, dtype, engine_options, speaking_flexflow
from flexmoe.serve.types import DataType, RequestType

if TYPE_CHECKING:
    from flexmoe import RequestOutput

_log = logging.getLogger(__name__)

NO_SPECULATION = (
    "FlexMoE decodes incrementally and does not speculate. Leave the SSMs out of compile: greedy text is the same "
    "without them, for speculation changes its speed alone."
)
# Keywords of compile that name what is not there; harmless while they say so.
_ADAPTER_KEYWORDS = ("max_concurrent_adapters", "num_bwd_layers_per_ft_step")
_SPECIFIC = {f"model_specific_{degree}": degree for degree in DEGREES}
_LIMITS = tuple(Limits.__dataclass_fields__)
_KEYWORDS = (*_LIMITS, "max_batch_size", *_ADAPTER_KEYWORDS, "enable_peft_finetuning", "ssms", *_SPECIFIC)


class LLM:
    """A model by its folder, its Hugging Face hub id, or "builtin" for the one that comes with FlexMoE.

    data_type: DT_HALF, DT_FLOAT or DT_BFLOAT16. cache_path: where the hub's files are kept. refresh_cache: fetch them
    again. output_file: a record of each request is appended to it.

    Raises MissingModelError (an OSError) and UnsupportedModelError (a ValueError). Weights are read by `compile`.
    """

    def __init__(
        self,
        model_name: str,
        data_type: DataType = DataType.DT_HALF,
        cache_path: str = "",
        refresh_cache: bool = False,
        output_file: str = "",
    ) -> None:
        self.data_type = data_type_name(data_type)
        self._checkpoint = checkpoints.find(model_name, cache_path, refresh_cache)
        self.model_name = str(model_name)
        self.model_type = checkpoints.model_type(self._checkpoint.config)
        self.hf_config = checkpoints.HFConfig(**{**self._checkpoint.hf_config, "_name_or_path": self.model_name})
        self.cache_path = checkpoints.shown_cache_path(cache_path)
        self.refresh_cache = refresh_cache
        self.output_file = output_file
        self.generation_config = GenerationConfig()
        self.max_seq_length = 0
        self.ssms: list[Any] = []
        self.pefts: dict[Any, Any] = {}
        self.rm: Server | None = None

    # ------------------------------------------------------------------------------------------------------ compile

    def compile(
        self,
        generation_config: GenerationConfig | None = None,
        max_requests_per_batch: int = 1,
        max_seq_length: int = 256,
        max_tokens_per_batch: int = 64,
        **options: Any,
    ) -> None:
        """Load the model for these limits; once more replaces it.

        Further options, by keyword, of every generation of FlexFlow: num_kv_cache_slots, max_batch_size (the old name
        of max_requests_per_batch), model_specific_{data,tensor,pipeline,expert}_parallelism_degree. Adapters,
        finetuning and ssms raise NotServedError. Raises ConfigError, in FlexFlow's names, for what the engine lacks.
        """
        limits = self._limits(
            options,
            max_requests_per_batch=max_requests_per_batch,
            max_seq_length=max_seq_length,
            max_tokens_per_batch=max_tokens_per_batch,
        )
        config = GenerationConfig() if generation_config is None else generation_config
        if not isinstance(config, GenerationConfig):
            raise WrongTypeError(f"generation_config={config!r} is not a GenerationConfig.")
        settings = {**DEFAULTS, **process.settings}
        settings |= {_SPECIFIC[name]: options[name] for name in _SPECIFIC if options.get(name) is not None}
        with speaking_flexflow():
            config.to_sampling(1)
            self._load(limits, settings)
        self.generation_config = config

    def _limits(self, options: Mapping[str, Any], **given: int) -> Limits:
        """Limits from all keywords; refuses what is unknown or not served."""
        for name in options:
            if name not in _KEYWORDS:
                raise UnknownArgumentError(name, _KEYWORDS, "LLM.compile")
        if options.get("ssms"):
            raise NotServedError(f"compile got ssms. {NO_SPECULATION}")
        if options.get("enable_peft_finetuning"):
            raise NotServedError(f"enable_peft_finetuning=True: {NO_ADAPTERS}")
        _warn_of_adapters(options)
        if options.get("max_batch_size") is not None:
            given["max_requests_per_batch"] = options["max_batch_size"]
        return Limits(**{**given, **{name: options[name] for name in _LIMITS if name in options}})

    def _load(self, limits: Limits, settings: Mapping[str, Any]) -> None:
        # Imported here, with torch behind it: naming models and checking options must not wait for it.
        import torch

        from flexmoe import llm as engine_llm

        cuda = torch.cuda.is_available()
        number_format = dtype(self.data_type, cuda)
        options = engine_options(limits, self._checkpoint.config, settings, dtype=number_format, cuda=cuda)
        self.close()
        self.rm = Server(engine_llm.LLM(**self._checkpoint.options, **options))
        # The server's thread holds the model: without this it would outlive the last one who knows this LLM.
        self._end = weakref.finalize(self, self.rm.close)
        self.max_seq_length = options["max_model_len"]

    # ----------------------------------------------------------------------------------------------------- generate

    def generate(
        self, requests_or_prompts: Any, max_length: int = lengths.UNSET, max_new_tokens: int = lengths.UNSET
    ) -> list[GenerationResult]:
        """Complete a str, a list of str, a chat (list of {"role", "content"}), a list of chats, a Request or a list.

        max_length counts prompt and output, max_new_tokens the output; a Request brings its own. Results come as a
        list in the order of the prompts: text with its prompt for plain prompts, the answer alone for chats.
        Raises RequestError (a ValueError) before anything is computed if any of them is refused.
        """
        server = self._server()
        chats, requests = self._as_requests(requests_or_prompts, max_length, max_new_tokens)
        if not requests:
            return []
        with speaking_flexflow():
            prompts = [
                ids or server.llm.tokenizer.encode(request.check(), request.add_special_tokens)
                for request, ids in requests
            ]
            params = [
                self.generation_config.to_sampling(self._new_tokens(request, ids))
                for (request, _), ids in zip(requests, prompts, strict=True)
            ]
            if self.output_file:
                record.prepare(self.output_file)
            outputs = server.run(prompts, params)
        whole = [self._whole(output) for output in outputs]
        if self.output_file:
            pairs = zip(outputs, whole, strict=True)
            record.append(self.output_file, [record.render(output, ids, text) for output, (ids, text) in pairs])
        if chats:
            return [GenerationResult(output.text, self._ended(output)) for output in outputs]
        return [GenerationResult(text, ids) for ids, text in whole]

    def _as_requests(
        self, given: Any, max_length: int, max_new_tokens: int
    ) -> tuple[bool, list[tuple[Request, list[int]]]]:
        """Whether these are chats, and one Request for each prompt, with a chat's token ids."""
        if isinstance(given, str):
            given = [given] if given else []
        elif isinstance(given, Request):
            given = [given]
        if not isinstance(given, list | tuple):
            raise WrongPromptError(f"generate got {_kind(given)}; {_PROMPTS}")
        first = given[0] if given else ""
        kind = next((kind for kind in (str, Request, Mapping, list) if isinstance(first, kind)), None)
        if kind is None or (kind is not Mapping and not all(isinstance(item, kind) for item in given)):
            mixed = sorted({_kind(item) for item in given})
            raise WrongPromptError(f"generate got a list of {' and '.join(mixed)}; {_PROMPTS}")
        if kind is Request:
            return False, [(request, []) for request in given]
        chats = kind is not str
        if chats:
            prompts = [self._chat(chat) for chat in ([given] if kind is Mapping else given)]
        else:
            prompts = [(text, []) for text in given]
        return chats, [
            (Request(RequestType.REQ_INFERENCE, text, max_length, max_new_tokens, add_special_tokens=not chats), ids)
            for text, ids in prompts
        ]

    def __chat2prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """A conversation as a text. FlexFlow's own FastAPI script calls it by its mangled name."""
        return self._chat(messages)[0]

    def _chat(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[int]]:
        """A conversation's prompt and its token ids."""
        llm = self._server().llm
        if not llm.engine.chat_template:
            raise RequestError(
                f"{self.model_name} has no chat template, so it cannot chat; give the prompt as a string."
            )
        return llm.encode_chat(messages)

    def _new_tokens(self, request: Request, prompt: Sequence[int]) -> int:
        if not prompt:
            raise RequestError("the prompt is empty; give at least one character.")
        chosen = lengths.choose(request.max_length, request.max_new_tokens, self.max_seq_length)
        return lengths.new_tokens(*chosen, len(prompt), self.max_seq_length)

    def _ended(self, output: RequestOutput) -> list[int]:
        """The output's tokens without the end-of-sequence token."""
        ids = list(output.token_ids)
        stopped = output.outputs[0].finish_reason == "stop"
        return ids[:-1] if stopped else ids

    def _whole(self, output: RequestOutput) -> tuple[list[int], str]:
        """Tokens and text of prompt and output, with the text of special tokens, without the end of sequence."""
        ids = [*output.prompt_token_ids, *self._ended(output)]
        return ids, self._server().llm.tokenizer.decode(ids, skip_special_tokens=False)

    # ------------------------------------------------------------------------------------------------------- server

    def start_server(self) -> None:
        """Serve. `generate` does so by itself."""
        self._server().start_server()
        _say("Background server started.")

    def stop_server(self) -> None:
        """Stop serving; the model stays loaded and can be started again. Stopping twice does no harm."""
        self._server().stop_server()
        _say("Background server stopped.")

    def close(self) -> None:
        """Free the model. FlexFlow has no such thing; `compile` loads it again."""
        if self.rm is not None:
            self._end()
            self.rm = None

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop the server, if there is one. An exception goes on its way; FlexFlow prints it."""
        if self.rm is not None:
            self.rm.stop_server()

    @property
    def tokenizer(self) -> Any:
        """encode and decode; None before `compile`, as in FlexFlow."""
        return None if self.rm is None else self.rm.llm.tokenizer

    def _server(self) -> Server:
        if self.rm is None:
            raise NotCompiledError("this LLM is not compiled yet; call llm.compile(...) first.")
        return self.rm

    # -------------------------------------------------------------------------------------------- files and adapters

    def download_hf_config(self) -> None:
        """Nothing is left to do: config.json was read when the LLM was made."""

    def download_hf_tokenizer_if_needed(self) -> None:
        """Nothing is left to do: the tokenizer came with config.json."""

    def download_hf_weights_if_needed(self) -> None:
        """Fetch the weights into the cache, if they are not there."""
        checkpoints.fetch(self._checkpoint)

    def register_peft_adapter(self, lora_config: Any) -> None:
        """Raises NotServedError: adapters are not served."""
        raise NotServedError(NO_ADAPTERS)

    def get_ff_peft_id(self, lora_config: Any) -> Any:
        """Raises NotServedError: adapters are not served."""
        raise NotServedError(NO_ADAPTERS)

    def download_peft_adapter_if_needed(self, peft_model_id: str) -> None:
        """Raises NotServedError: adapters are not served."""
        raise NotServedError(NO_ADAPTERS)


class SSM:
    """FlexFlow's small speculative model. Making one raises NotServedError, which says how to go on without."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise NotServedError(f"SSM: {NO_SPECULATION}")


_PROMPTS = "give a string, a list of strings, a chat, a list of chats, a Request or a list of Requests."


def _warn_of_adapters(options: Mapping[str, Any]) -> None:
    """Say once, by name, that a keyword about adapters changes nothing."""
    idle = process.unsaid(name for name in _ADAPTER_KEYWORDS if name in options)
    if idle:
        _log.warning("%s: no effect, for adapters are not served.", ", ".join(idle))


def _kind(value: object) -> str:
    return type(value).__name__


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
