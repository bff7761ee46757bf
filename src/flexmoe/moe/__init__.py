"""The Mixture-of-Experts layer. Start with block.py."""
