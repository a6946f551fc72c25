"""`AgentFormat`: how a family of agents is asked and how it answers; the list of those there are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

from mmkv.agents.action import Parsed, PastStep
from mmkv.agents.coordinates import Resize

FORMATS: dict[str, type[AgentFormat]] = {}


@dataclass(frozen=True)
class AgentFormat:
    """The prompt and the answer of one family of agents. Subclasses are frozen dataclasses with a `name`.

    ```python
    @register
    @dataclass(frozen=True)
    class MyAgent(AgentFormat):
        name = "my_agent"

        def messages(self, instruction, steps, screenshot):
            return [{"role": "user", "content": [image(screenshot), text(instruction)]}]

        def parse(self, text, size):
            return Parsed(text, actions=...)
    ```

    A checkpoint says its format by the key `agent_format` of its config.json, or a format knows it (`suits`).

    Args:
        resize: how the processor sizes a screenshot; `mmkv.agent` sets it from the processor.
    """

    resize: Resize = field(default_factory=Resize)
    name: ClassVar[str] = ""

    def messages(self, instruction: str, steps: Sequence[PastStep], screenshot) -> list[dict]:
        """The chat for the next step.

        Args:
            instruction: the task.
            steps: what was done so far, oldest first; those without a screenshot are told as text.
            screenshot: the current picture.

        Returns:
            turns for a chat template: `{"role": ..., "content": ...}`, the content a text or a list of `image(...)` and
            `text(...)` parts; image parts stand in the order in which the processor gets the pictures.
        """
        raise NotImplementedError(f"{type(self).__name__}.messages")

    def parse(self, text: str, size: tuple[int, int]) -> Parsed:
        """Read an output. Never raises on what a model wrote: `Parsed.problems` says what could not be read.

        Args:
            text: what the model wrote.
            size: width and height of the screenshot it saw, before resizing.
        """
        raise NotImplementedError(f"{type(self).__name__}.parse")

    @classmethod
    def suits(cls, config) -> bool:
        """Whether a model with this configuration writes this format."""
        return False

    def for_processor(self, processor) -> AgentFormat:
        """This format with the processor's limits of pixels."""
        return replace(self, resize=Resize.of(processor))


def image(picture) -> dict:
    """A picture as a part of a turn."""
    return {"type": "image", "image": picture}


def text(words: str) -> dict:
    """Words as a part of a turn."""
    return {"type": "text", "text": words}


def register(cls: type[AgentFormat]) -> type[AgentFormat]:
    """Enter a format under its name; a decorator.

    Raises:
        ValueError: no name, or one that another class has.
    """
    if not cls.name or FORMATS.get(cls.name, cls).__qualname__ != cls.__qualname__:
        raise ValueError(f"format name {cls.name!r} of {cls.__name__}: possible is a name that no other format has")
    FORMATS[cls.name] = cls
    return cls


def get_format(name: str, **options) -> AgentFormat:
    """A format by its name, with options of its class.

    Raises:
        ValueError: no such format, or no such option.
    """
    cls = FORMATS.get(name)
    if cls is None:
        raise ValueError(f"format {name!r}: possible are {', '.join(sorted(FORMATS))}")
    known = {f.name for f in fields(cls)}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"format {name!r} has no option {', '.join(unknown)}; possible are {', '.join(sorted(known))}")
    return cls(**options)


def format_for(model) -> AgentFormat:
    """The format that a model was trained on: by `config.agent_format`, else by what the formats know.

    Raises:
        ValueError: none is known for it.
    """
    config = getattr(model, "config", None)
    if name := getattr(config, "agent_format", None):
        return get_format(name)
    for cls in FORMATS.values():
        if config is not None and cls.suits(config):
            return cls()
    raise ValueError(
        f"no agent format is known for {type(model).__name__}; give format=..., possible are {', '.join(sorted(FORMATS))}"
    )
