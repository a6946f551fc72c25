"""Streams: a video watched as it comes, asked about at any time."""
