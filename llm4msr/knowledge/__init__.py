"""Prompts, the frozen language model, and the store of its vectors."""
