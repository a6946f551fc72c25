"""Token methods, one per file: they drop or merge tokens before or inside the decoder."""
