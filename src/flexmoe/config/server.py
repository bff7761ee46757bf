"""ServerConfig: every option of the HTTP server. Enters: user values. Leaves: checked ones."""

from __future__ import annotations

from dataclasses import dataclass

from flexmoe.errors import ConfigError

# Pieces of streams a second, by device. One costs some 20 us, which a model on a CPU misses on its cores.
_CHUNK_RATES = {"cpu": 1000.0}


def usual_chunk_rate(device: str) -> float:
    """Pieces of streams that a server lets cross in a second, if nobody asks for another rate."""
    return _CHUNK_RATES.get(device, 10_000.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where the server listens, who may use it, and how much of it.

    served_model_name: what requests call the model; None: its name, or its folder's. api_keys: any of them opens; none:
    no key is asked for. cors_origins: web pages that may use the server from a browser; "*": all.
    max_body_bytes: of a request. max_n: samples of one prompt. max_prompts: prompts of one request. max_prompt_tokens:
    of one prompt; None: what the model's context allows. max_waiting: samples that may wait beyond the max_num_seqs
    that run; more are refused with status 429.
    receive_seconds: how long a client may take to send its request. drain_seconds: how long requests may go on after
    SIGTERM. step_seconds: how long a step of the engine may take before it counts as hung: then health checks fail and
    requests are refused; 0: any time; None: 1,800 on a CPU, else 300. expert_interval: seconds between looks at which
    experts are chosen; 0: never. max_chunk_rate: pieces of streams a second in all; where tokens come more quickly, a
    piece holds several of them. None: 1,000 for a model on a CPU, which needs the same cores, else 10,000.
    compare: what the web page compares with: "hf", or the URL of an OpenAI endpoint, whose key is compare_key.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str | None = None
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    max_body_bytes: int = 2**22
    max_n: int = 16
    max_prompts: int = 64
    max_prompt_tokens: int | None = None
    max_waiting: int = 256
    receive_seconds: float = 20.0
    drain_seconds: float = 30.0
    step_seconds: float | None = None
    expert_interval: float = 1.0
    max_chunk_rate: float | None = None
    log_prompts: bool = False
    compare: str | None = None
    compare_key: str | None = None

    def __post_init__(self) -> None:
        if any(not key or not key.isascii() or key != key.strip() for key in self.api_keys):
            raise ConfigError("an API key is empty, not ASCII or has white space around it; use letters and digits.")
        if not 0 <= self.port < 2**16:
            raise ConfigError(f"port={self.port} is not a port; use 0 to 65535 (0: any that is free).")
        for name in ("max_body_bytes", "max_n", "max_prompts", "max_prompt_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} is not a positive integer.")
        for name in ("max_waiting", "drain_seconds", "step_seconds", "expert_interval"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ConfigError(f"{name}={value} is below 0.")
        for name in ("receive_seconds", "max_chunk_rate"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name}={value} is not above 0.")
