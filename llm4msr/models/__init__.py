"""Backbones, meta networks and the LLM4MSR wrapper: plain torch modules."""
