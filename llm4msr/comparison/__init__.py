"""Backbones and kinds of knowledge compared over seeds: what is trained, how, what follows from it, and the report."""
