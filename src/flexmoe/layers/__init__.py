"""The parts of a decoder layer that every model shares: projections, norms, rotary embedding, attention, KV cache."""
