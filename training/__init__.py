"""Scripts that made the built-in model: corpus, tokenizer, training, export, evaluation. See README.md here."""
