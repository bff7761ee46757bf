"""What goes into `LLM.generate` and what comes out. Enters: a script's values. Leaves: SamplingParams, results."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flexmoe.config.sampling import SamplingParams
from flexmoe.serve.errors import NotServedError, WrongTypeError
from flexmoe.serve.text import OutputText
from flexmoe.serve.types import OptimizerType, RequestType

NO_ADAPTERS = (
    "FlexMoE serves no PEFT adapters and does not finetune. Merge the adapter into its base model (peft's "
    "merge_and_unload, then save_pretrained) and give that folder as model_name."
)


@dataclass
class GenerationConfig:
    """How tokens are chosen, for all requests of a compiled model.

    do_sample=False is greedy, whatever the rest says. With do_sample=True temperature and topp count, and topk from
    2 on: FlexFlow stores topk and never reads it, and its default of 1, which scripts spell out, would undo sampling.
    """

    do_sample: bool = False
    temperature: float = 0.9
    topp: float = 0.8
    topk: int = 1

    def to_sampling(self, max_tokens: int) -> SamplingParams:
        """The same for `flexmoe.LLM`. Raises RequestError (a ValueError) for a number out of its range."""
        if not self.do_sample:
            return SamplingParams(temperature=0.0, max_tokens=max_tokens)
        top_k = self.topk if self.topk != 1 else 0
        return SamplingParams(temperature=self.temperature, top_p=self.topp, top_k=top_k, max_tokens=max_tokens)


@dataclass
class GenerationResult:
    """One answer.

    output_text: the prompt and its completion, or the completion alone for a chat. output_tokens: the ids of that
    text. finetuning_losses: always empty.
    """

    text: str | bytes | None = None
    tokens: list[int] | None = None
    finetuning_losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        text = self.text.decode("utf-8", "replace") if isinstance(self.text, bytes) else self.text
        self.output_text: Any = None if text is None else OutputText(text)
        self.output_tokens = list(self.tokens or [])


@dataclass
class Request:
    """One prompt with its own lengths. -1: not given. Only RequestType.REQ_INFERENCE without an adapter is served."""

    req_type: RequestType = RequestType.REQ_INFERENCE
    prompt: str | None = None
    max_length: int = -1
    max_new_tokens: int = -1
    add_special_tokens: bool = True
    peft_model_id: Any = None
    dataset_filepath: str | None = None
    max_training_steps: int = 1

    def check(self) -> str:
        """The prompt. Raises NotServedError for finetuning and adapters, WrongTypeError if the prompt is no text."""
        if self.req_type is not RequestType.REQ_INFERENCE:
            raise NotServedError(f"req_type={self.req_type}: {NO_ADAPTERS}")
        if self.peft_model_id is not None:
            raise NotServedError(f"peft_model_id={self.peft_model_id!r}: {NO_ADAPTERS}")
        if not isinstance(self.prompt, str):
            raise WrongTypeError(f"a Request's prompt is {self.prompt!r}; give a string.")
        return self.prompt


@dataclass(eq=False)
class LoraLinearConfig:
    """An adapter's description. It can be made, so that scripts import and build it; using it raises NotServedError."""

    cache_folder: str = ""
    peft_model_id: str = ""
    trainable: bool = False
    init_lora_weights: bool = False
    base_model_name_or_path: str = ""
    precision: str = "fp16"
    rank: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = None
    target_modules: list[str] = field(default_factory=list)
    optimizer_type: OptimizerType = OptimizerType.OPTIMIZER_TYPE_NONE
    optimizer_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PEFTModelID:
    """The handle of a registered adapter; none is ever handed out."""

    id: int = 0
