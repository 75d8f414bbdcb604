"""The ranker behind HTTP."""
