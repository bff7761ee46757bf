"""From a model's name to tensors: hub finds the folder, families read config.json, loader fills the weights."""
