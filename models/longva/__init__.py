"""LongVA: CLIP tiles of 144 tokens and a Qwen2 decoder that reads 224K tokens (Zhang et al. 2024, arXiv 2406.16852).

```python
from mmkv.models import longva
model, processor = longva.load("lmms-lab/LongVA-7B")  # the original checkpoint, by its own keys
inputs = processor(text=processor.prompt("What happens?", "video"), videos=[frames])
out = model.generate(**inputs.to(model.device))
```

Names are imported on first use: naming the family costs nothing of CLIP or Qwen2.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "LongVAConfig": "configuration",
    "LongVAForConditionalGeneration": "modeling",
    "LongVAProcessor": "processor",
    "is_longva": "configuration",
    "load": "loading",
}
__all__ = ["LongVAConfig", "LongVAForConditionalGeneration", "LongVAProcessor", "is_longva", "load"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
