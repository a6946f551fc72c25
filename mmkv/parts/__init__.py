"""What cache and token methods share: the registry of methods."""
