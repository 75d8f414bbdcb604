"""Scoring in batches, through the same `Ranker` that serves requests: for e-mails, and for caches that are filled."""
