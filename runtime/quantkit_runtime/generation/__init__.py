"""Writing text with a language model: several answers at once, token by token."""
