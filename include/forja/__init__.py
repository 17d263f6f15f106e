"""Forja: from events in Kafka to gated, optimised models in Triton."""

__version__ = "0.1.0"
