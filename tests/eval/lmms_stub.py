"""A stand-in for lmms-eval 0.7.3 of the few names that our plug-in touches, so that its tests need no package.

Spec: `api/model.py`, `api/instance.py`, `protocol.py`, `models/registry_v2.py`, `models/model_utils/gen_metrics.py` there.
"""

from __future__ import annotations

import abc
import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any


class Lmms(abc.ABC):
    is_simple = True

    def __init__(self):
        self._rank, self._world_size = 0, 1
        self.cache_hook = Hook()
        self.task_dict = {}

    @property
    def rank(self):
        return self._rank

    @property
    def world_size(self):
        return self._world_size

    @abc.abstractmethod
    def loglikelihood(self, requests): ...

    @abc.abstractmethod
    def generate_until(self, requests): ...

    @abc.abstractmethod
    def generate_until_multi_round(self, requests): ...

    def clean(self):
        import torch

        for name in [name for name, value in vars(self).items() if isinstance(value, torch.nn.Module)]:
            delattr(self, name)


class Hook:
    """Records what the response cache is told."""

    def __init__(self):
        self.told = []

    def add_partial(self, *what):
        self.told.append(what)


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


@dataclass
class Instance:
    args: tuple
    request_type: str = "generate_until"


class ChatMessages:
    def __init__(self, messages):
        blank = {"start_time": None, "end_time": None}
        self.messages = [
            SimpleNamespace(
                role=turn["role"], content=[SimpleNamespace(**{**blank, **part}) for part in turn["content"]]
            )
            for turn in messages
        ]


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: str | None = None
    chat_class_path: str | None = None
    aliases: tuple = ()


@dataclass
class Stub:
    """The fake modules, and what the fake metrics log was told."""

    modules: dict[str, ModuleType]
    logged: list[dict[str, Any]] = field(default_factory=list)


def install(monkeypatch) -> Stub:
    """Put the stand-in where `import lmms_eval` finds it, for one test; our class is imported anew on top of it."""
    stub = Stub({})
    names = {
        "lmms_eval": {}, "lmms_eval.api": {}, "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.api.instance": {"Instance": Instance, "GenerationResult": GenerationResult, "TokenCounts": TokenCounts},
        "lmms_eval.models": {}, "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "lmms_eval.models.model_utils": {},
        "lmms_eval.models.model_utils.gen_metrics": {"log_metrics": lambda **told: stub.logged.append(told)},
        "lmms_eval.protocol": {"ChatMessages": ChatMessages},
    }  # fmt: skip
    for name, content in names.items():
        module = ModuleType(name)
        vars(module).update(content)
        stub.modules[name] = module
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "mmkv.eval.lmms_model", raising=False)
    return stub
