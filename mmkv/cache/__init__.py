"""KV caching: methods, one per file, and what they share (method, formats, segment, layer, state, cache)."""

from mmkv.cache.cache import Cache, adopt, settle_jointly, state_of
from mmkv.cache.formats import ChannelClass, Packer, PackFormat, Side
from mmkv.cache.interface import NAME, register
from mmkv.cache.kivi import KIVI
from mmkv.cache.layer import KVLayer
from mmkv.cache.method import CacheMethod
from mmkv.cache.pipeline import Pipeline, pipeline
from mmkv.cache.segment import PackedSegment
from mmkv.cache.snapkv import SnapKV
from mmkv.cache.state import CacheState
from mmkv.cache.streaming_llm import StreamingLLM
from mmkv.cache.vidkv import VidKV
from mmkv.cache.waterfill import WaterfillKV

__all__ = [
    "KIVI", "NAME", "Cache", "CacheMethod", "CacheState", "ChannelClass", "KVLayer", "PackFormat", "PackedSegment", "Packer",
    "Pipeline", "Side", "SnapKV", "StreamingLLM", "VidKV", "WaterfillKV", "adopt", "pipeline", "register", "settle_jointly", "state_of",
]  # fmt: skip
