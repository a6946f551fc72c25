"""Which model and preprocessing a memory belongs to."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import torch

from mmkv.streaming.store import advance


def fingerprint(model: torch.nn.Module) -> str:
    """Of a model's configuration and weights: shapes of all, and 64 numbers of each."""
    digest = hashlib.blake2b(digest_size=16)
    config = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_") and k != "transformers_version"}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        flat = weight.detach().flatten()
        some = flat[:: max(flat.numel() // 64, 1)][:64]
        digest.update(some.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def content_after(content: str | None, pictures: np.ndarray, frames: int) -> str:
    """The hash of a stream's pictures behind F further frames, uint8 `[F * p, H, W, 3]`, from the one before."""
    content = content or ""
    for frame in np.split(pictures, frames):
        content = advance(content, np.ascontiguousarray(frame).data)
    return content


def preprocessing(processor, about: dict) -> str:
    """Everything that happens to pictures before they are stored, as text: JSON of `about` and a hash of the settings.

    Args:
        processor: of the model.
        about: JSON-able facts; `told` reads them back.
    """
    video = getattr(processor, "video_processor", None)
    settings = json.dumps({} if video is None else video.to_dict(), sort_keys=True, default=str)
    digest = hashlib.blake2b(settings.encode(), digest_size=16).hexdigest()
    return json.dumps({**about, "processor": digest}, sort_keys=True)


def told(text: str) -> dict:
    """The facts that `preprocessing` put into a text."""
    return json.loads(text)
