"""What a workspace holds: complete, running, stopped and failed stages; what jobs.status prints."""
