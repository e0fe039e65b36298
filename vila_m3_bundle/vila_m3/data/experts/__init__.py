"""Conversations in which an expert takes part: one module per expert."""
