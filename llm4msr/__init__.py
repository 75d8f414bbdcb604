"""Multi-scenario recommendation enhanced by a large language model (LLM4MSR), distributed with Ray."""

__version__ = "0.2.0"
