"""What a machine should do with a model: where experts go. Plain Python, no tensors."""
