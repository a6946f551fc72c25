"""A cache while single tokens are decoded: buffers that never move, lengths that the device counts (for CUDA graphs)."""

from mmkv.cache.static.stretch import LEAST, ROOM, Stretch, possible, refusal

__all__ = ["LEAST", "ROOM", "Stretch", "possible", "refusal"]
