"""The vocabulary: frozen dataclasses that every other room reads. No torch here."""
