"""What cache and token methods share: probe, matching, decision."""
