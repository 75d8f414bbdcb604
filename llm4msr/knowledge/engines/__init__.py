"""Engines: what turns prompts into vectors and words."""
