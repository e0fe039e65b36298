"""Contracts and mechanics shared by every bundle of the collection; imports no bundle."""

__version__ = "0.1.0"
