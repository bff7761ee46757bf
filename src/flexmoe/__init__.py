"""FlexMoE serves Mixture-of-Experts language models. The plain face: LLM, SamplingParams, RequestOutput, the errors."""

from __future__ import annotations

__version__ = "0.1.0"
