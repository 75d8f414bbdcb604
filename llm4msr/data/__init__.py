"""Raw logs in, prepared data out."""
