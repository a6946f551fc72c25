"""Token methods at work on a model: in its vision tower, before its decoder, between its layers; and learned rates."""
