"""What a machine should do with a model, and how long that takes. Plain Python, no tensors."""
