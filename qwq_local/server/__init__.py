"""The OpenAI-compatible server; the only place with async."""
