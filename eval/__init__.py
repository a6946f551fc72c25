"""Evaluation: what measures accuracy, bytes and time of the methods."""
