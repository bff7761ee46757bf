"""The engine room: text to tokens, tokens through the model, tokens to text. Nothing is imported before it is used."""
