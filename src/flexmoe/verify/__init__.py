"""Does the engine say what Hugging Face transformers says? Start with run.py; transformers is imported on use."""
