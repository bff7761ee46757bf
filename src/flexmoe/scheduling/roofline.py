"""How many tokens a step should compute. Enters: a model, and a device's arithmetic a byte read. Leaves: StepTokens.

A step of few tokens takes as long as reading its weights does, whatever it computes; one of many takes as long as its
products. They meet at the *balance point*: the T at which

    2 T parameters_a_token / (FLOPs a second)  =  bytes_read(T) / (bytes a second)

where bytes_read counts the distinct experts that T tokens are expected to choose. Sparse models meet late: T tokens of
Qwen3-30B-A3B read ten times the weights that they multiply by, so that it takes some 2,400 tokens on an H200 where a
dense model needs 200.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexmoe.config.model import ModelConfig

# Dense bf16 FLOPs over bytes a second, both as data sheets have them. That moves the budget and nothing else, which may
# be wrong by a third without harm: a card that is not here has a middling one.
_CARDS = {"A100": 156, "H100": 295, "H200": 206, "GH200": 206, "B200": 281, "L40S": 419, "L4": 403}
_ANY_GPU = 200.0
_ANY_CPU = 10.0
# At three times the balance point of data sheets, four times the measured one, reading is a quarter of the products'
# time, if it is not hidden behind them altogether: more tokens gain little, and cost memory and others' time.
_FACTOR = 3
_FEWEST, _MOST, _STEP = 2048, 8192, 256
# Measured on an H200: 512 requests of 512 + 128 tokens of Mixtral get 7 to 8% more tokens a second in steps of 8,192
# than in its 2,304, of which each leaves processors idle behind its last tiles; with 16,384 no more.
_UNWATCHED = {"cuda": 8192}
_LEAST, _LEAST_STEP = 64, 64


@dataclass(frozen=True, slots=True)
class StepTokens:
    """Tokens of one step. most: the budget where none is asked for. unwatched: the same, if that is more, where nobody
    reads tokens as they come, so that no first token is waited for.

    least: a chunk of prompts that is cut shorter, so as not to hold up others, spends more than half of its time on
    reading weights: it is made no shorter than that.
    """

    most: int = _FEWEST
    least: int = _LEAST
    unwatched: int = 0

    def asked(self, budget: int | None) -> StepTokens:
        """With a budget that somebody asked for, whoever reads along."""
        return StepTokens(budget, min(self.least, budget)) if budget else self

    @property
    def widest(self) -> int:
        """The largest budget."""
        return max(self.most, self.unwatched)


def step_tokens(config: ModelConfig, itemsize: int, kind: str, card: str | None = None) -> StepTokens:
    """For a model in numbers of `itemsize` bytes, on a device. kind, card: see `flops_per_byte`."""
    balance = balance_point(config, flops_per_byte(kind, card), itemsize)
    most = _rounded(_FACTOR * balance, _STEP)
    return StepTokens(
        most=min(max(most, _FEWEST), _MOST), least=min(max(_rounded(balance / 2, _LEAST_STEP), _LEAST), _MOST),
        unwatched=_UNWATCHED.get(kind, 0),
    )  # fmt: skip


def balance_point(config: ModelConfig, flops_per_byte: float, itemsize: int) -> int:
    """The fewest tokens whose products take as long as reading their weights, but for the head: few rows reach it."""
    multiplied = config.num_active_parameters() - config.vocab_size * config.hidden_size
    low, high = 1, 2**20
    while low < high:
        tokens = (low + high) // 2
        if 2 * tokens * multiplied >= flops_per_byte * itemsize * parameters_read(config, tokens):
            high = tokens
        else:
            low = tokens + 1
    return low


def parameters_read(config: ModelConfig, tokens: int) -> float:
    """Weights that a step of so many tokens reads, if all experts are as likely; without embedding and head."""
    always = config.num_active_parameters() - config.vocab_size * config.hidden_size
    if config.moe is None:
        return always
    expert = 3 * config.hidden_size * config.moe.expert_width
    beyond_one = config.moe.expected_experts(tokens) - config.moe.top_k
    return always + beyond_one * expert * sum(layer.is_moe for layer in config.layers)


def flops_per_byte(kind: str, card: str | None = None) -> float:
    """What data sheets say of a device. kind: torch's name for it. card: as the driver names it, e.g. "NVIDIA H200"."""
    if kind == "cpu":
        return _ANY_CPU
    words = (card or "").replace("-", " ").split()
    return next((float(balance) for name, balance in _CARDS.items() if name in words), _ANY_GPU)


def _rounded(tokens: float, step: int) -> int:
    return round(tokens / step) * step
