"""The memory of a video stream: keys and values of every frame, in three tiers (device, RAM, disk).

`open_store` opens one; `Store` says how it is used.
"""

from .chunk import Chunk, Shape
from .damage import DamagedFrames
from .folder import peek
from .key import Key, advance
from .opening import open_store
from .packing import FORMATS, cache_of, packed_by
from .store import Store

__all__ = [
    "FORMATS", "Chunk", "DamagedFrames", "Key", "Shape", "Store", "advance", "cache_of", "open_store", "packed_by", "peek",
]  # fmt: skip
