"""Several processes for one model: groups of ranks and what they exchange, how they start, and who watches them."""
