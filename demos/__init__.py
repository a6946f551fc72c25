"""Demos: what a person runs to see a method at work."""
