"""Benchmarks: questions of a data set, a model's answers, two gradings, intervals and reports."""
