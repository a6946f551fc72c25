"""mmkv: long video, many screenshots and large images in a fraction of the KV cache.

```python
import mmkv
model = mmkv.wrap(model, "vidkv")   # one call in
out = model.generate(**inputs)      # nothing else changes
print(mmkv.report(model))           # measured bytes, bits, times
model = mmkv.unwrap(model)          # bit-identical to before
```

Names are imported on first use, so `import mmkv` is quick and touches nothing of torch or transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmkv._presets import methods, presets
    from mmkv._report import Report, report
    from mmkv._wrap import unwrap, wrap, wrapped
    from mmkv.agents.agent import agent
    from mmkv.cache import Cache
    from mmkv.streaming.stream import stream
    from mmkv.video import open_video

__version__ = "0.1.0"

_HOME = {
    "agent": "mmkv.agents.agent",
    "wrap": "mmkv._wrap",
    "unwrap": "mmkv._wrap",
    "wrapped": "mmkv._wrap",
    "report": "mmkv._report",
    "Report": "mmkv._report",
    "methods": "mmkv._presets",
    "presets": "mmkv._presets",
    "Cache": "mmkv.cache",
    "open_video": "mmkv.video",
    "stream": "mmkv.streaming.stream",
}
_ROOMS = {"agents", "cache", "demos", "eval", "kernels", "models", "parts", "streaming", "tokens", "video"}

__all__ = [
    "Cache",
    "Report",
    "__version__",
    "agent",
    "methods",
    "open_video",
    "presets",
    "report",
    "stream",
    "unwrap",
    "wrap",
    "wrapped",
]


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return import_module(f"mmkv.{name}")
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'mmkv' has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__) | _ROOMS)
