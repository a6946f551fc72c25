"""KV caching: methods, one per file, and what they share (method, formats, segment, layer, state, cache)."""

from mmkv.cache.adakv import AdaKV
from mmkv.cache.cache import Cache, adopt, settle_jointly, state_of
from mmkv.cache.formats import ChannelClass, Packer, PackFormat, Side
from mmkv.cache.gear import GEAR
from mmkv.cache.guikv import GUIKV
from mmkv.cache.h2o import H2O
from mmkv.cache.hack import HACK
from mmkv.cache.infinipotv import InfiniPotV
from mmkv.cache.interface import NAME, register
from mmkv.cache.kivi import KIVI
from mmkv.cache.kvmerger import KVMerger
from mmkv.cache.layer import KVLayer
from mmkv.cache.method import CacheMethod
from mmkv.cache.mikv import MiKV
from mmkv.cache.next_scale import ScaleStatistics
from mmkv.cache.pipeline import Pipeline, pipeline
from mmkv.cache.prefixkv import PrefixKV, ratios_from
from mmkv.cache.pyramidkv import PyramidKV
from mmkv.cache.razor import RazorAttention, RetrievalHeads
from mmkv.cache.scalekv import ScaleKV, scale_budgets
from mmkv.cache.segment import PackedSegment
from mmkv.cache.snapkv import SnapKV
from mmkv.cache.state import CacheState
from mmkv.cache.streaming_llm import StreamingLLM
from mmkv.cache.vidkv import VidKV
from mmkv.cache.waterfill import WaterfillKV
from mmkv.cache.zipcache import ZipCache
from mmkv.cache.zipvl import ZipVL

__all__ = [
    "GEAR", "GUIKV", "H2O", "HACK", "KIVI", "NAME", "AdaKV", "Cache", "CacheMethod", "CacheState", "ChannelClass",
    "InfiniPotV", "KVLayer", "KVMerger", "MiKV", "PackFormat", "PackedSegment", "Packer", "Pipeline", "PrefixKV", "PyramidKV",
    "RazorAttention", "RetrievalHeads", "ScaleKV", "ScaleStatistics", "Side", "SnapKV", "StreamingLLM", "VidKV",
    "WaterfillKV", "ZipCache", "ZipVL", "adopt", "pipeline", "ratios_from", "register", "scale_budgets", "settle_jointly",
    "state_of",
]  # fmt: skip
