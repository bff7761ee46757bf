"""FlexFlow's kinds of error with FlexMoE's messages: each is also the exception that FlexFlow raises at that place.

WrongTypeError(ConfigError, TypeError)                   a value of `init`, `LLM` or `compile` has the wrong type
UnknownArgumentError(UnknownOptionError, TypeError)      a keyword that does not exist
NotServedError(ConfigError, NotImplementedError)         speculation, adapters, finetuning, quantization on a GPU
NotCompiledError(EngineError, AttributeError)            `generate` before `compile`
MissingModelError(CheckpointError, OSError)             there is no such model, or its files are damaged
WrongPromptError(RequestError, TypeError, AssertionError)  `generate` got something that is no prompt
"""

from __future__ import annotations

from flexmoe.errors import CheckpointError, ConfigError, EngineError, RequestError, UnknownOptionError


class WrongTypeError(ConfigError, TypeError):
    """A value has the wrong type."""


class UnknownArgumentError(UnknownOptionError, TypeError):
    """A keyword argument that does not exist; names the nearest one that does."""


class NotServedError(ConfigError, NotImplementedError):
    """Something FlexFlow does and FlexMoE does not; says how to go on without it."""


class NotCompiledError(EngineError, AttributeError):
    """The model was asked to generate before it was compiled."""


class MissingModelError(CheckpointError, OSError):
    """There is no such model, or its files are damaged."""


class MissingFileError(ConfigError, OSError):
    """A configuration or prompt file cannot be read."""


class WrongPromptError(RequestError, TypeError, AssertionError):
    """What was given to `generate` is no prompt."""
