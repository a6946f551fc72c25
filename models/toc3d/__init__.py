"""ToC3D end to end: a ViT backbone with the router, a compact multi-view temporal 3D detector, synthetic scenes, nuScenes files.

python -m mmkv.models.toc3d.train --work DIR      # minutes on one CPU core; again with the same DIR to resume
python -m mmkv.models.toc3d.evaluate --work DIR   # dense against ToC3D: accuracy, tokens, time
"""
