"""Chest X-ray expert: an ensemble of classifiers for 18 findings."""
