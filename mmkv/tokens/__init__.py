"""Token methods, one per file: they drop or merge tokens before or inside the decoder."""

from mmkv.tokens.diffrate import DiffRate
from mmkv.tokens.dycoke import DyCoke
from mmkv.tokens.evs import EVS
from mmkv.tokens.fastv import FastV
from mmkv.tokens.mustdrop import MustDrop
from mmkv.tokens.prumerge import PruMerge
from mmkv.tokens.sparsevlm import SparseVLM
from mmkv.tokens.toc3d import ToC3D
from mmkv.tokens.tome import ToMe
from mmkv.tokens.uniform import Uniform
from mmkv.tokens.vidcom2 import VidCom2
from mmkv.tokens.visionzip import VisionZip

__all__ = [
    "EVS",
    "DiffRate",
    "DyCoke",
    "FastV",
    "MustDrop",
    "PruMerge",
    "SparseVLM",
    "ToC3D",
    "ToMe",
    "Uniform",
    "VidCom2",
    "VisionZip",
]
