"""ScreenSpot-v2 and ScreenSpot-Pro as tasks: one screenshot, one instruction, one click."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

from mmkv.agents import AgentFormat, format_for, get_format
from mmkv.eval.agent_chat import placeholders
from mmkv.eval.digest import digest
from mmkv.eval.media import Media, read_image
from mmkv.eval.screenspot.data import Element, read_pro, read_v2
from mmkv.eval.screenspot.score import accuracies, clicked, hits, macro, split
from mmkv.eval.task import Prompt, Sample, Task, by_facet

GROUNDING: dict[str, dict[str, str]] = {"opencua": {"level": "grounding"}, "ui_tars": {"prompt": "grounding"}}
"""Options of the formats that have a prompt of their own for grounding; others are asked as for a session's first step."""


class ScreenSpotV2(Task):
    """ScreenSpot-v2: elements of mobile, desktop and web screens (OS-Atlas, arXiv 2410.23218).

    Args:
        data: folder of the annotations.
        images: folder of the screenshots; by default one beside them.
        agent: format's name or instance; by default the one that the model was trained on, with its grounding prompt.
        max_new_tokens: longest answer, in tokens.

    Raises:
        FileNotFoundError: no annotations there.
    """

    name = "screenspot-v2"
    scorer = "screenspot-1"
    reader: ClassVar[Callable[..., list[Element]]] = staticmethod(read_v2)
    facets: ClassVar[tuple[str, ...]] = ("platform", "kind")

    def __init__(
        self,
        data: str | Path,
        images: str | Path | None = None,
        agent: AgentFormat | str | None = None,
        max_new_tokens: int = 128,
    ):
        self.agent = _grounding(get_format(agent)) if isinstance(agent, str) else agent
        self.given = self.agent
        self.max_new_tokens = max_new_tokens
        self.elements = type(self).reader(data, images)
        self.digest = digest(Path(data).rglob("*.json"), (element.image for element in self.elements))

    def begin(self, model: Any, processor: Any) -> None:
        self.agent = (self.given or _grounding(format_for(model))).for_processor(processor)

    def settings(self) -> dict[str, Any]:
        return dict(data=self.digest, elements=len(self.elements), agent=repr(self.given) if self.given else "by model")

    def samples(self) -> list[Sample]:
        return [self._sample(element) for element in self.elements]

    def _sample(self, element: Element) -> Sample:
        facts = dict(platform=element.platform, kind=element.kind, **element.facts)
        # a screenshot may be asked about several times; questions about one resemble each other
        group = element.image.name or element.id
        return Sample(element.id, group, facts, list(element.box), dict(element=element), element.problem or None)

    def media(self, sample: Sample) -> Media:
        return Media(images=(read_image(sample.data["element"].image),))

    def prompt(self, sample: Sample, media: Media) -> Prompt:
        return Prompt(placeholders(self._format().messages(sample.data["element"].instruction, [], None))[0])

    def score(self, sample: Sample, response: str) -> dict[str, Any]:
        with Image.open(sample.data["element"].image) as picture:
            size = picture.size
        parsed = self._format().parse(response, size)
        point = clicked(parsed)
        right = point is not None and hits(point, sample.data["element"].box, size)
        return dict(
            score=float(right),
            correct=right,
            answer=None if point is None else [point[0] * size[0], point[1] * size[1]],
            wrong_format=point is None,
            problems=list(parsed.problems),
        )

    def summary(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        found = accuracies(rows)
        shares = dict(accuracy=found["accuracy"], text=found["text"], icon=found["icon"], macro=macro(rows))
        return dict(
            headline={label: 100 * number for label, number in shares.items() if number is not None},
            by=by_facet(rows, self.facets),
            wrong_format=found["wrong_format"],
            accuracies={facet: split(rows, facet) for facet in self.facets if facet != "kind"},
        )

    def template(self) -> str:
        return "" if self.given is None else repr(self.given.messages("{instruction}", [], None))

    def _format(self) -> AgentFormat:
        if self.agent is None:
            raise ValueError("the agent's format is not known yet: call begin(model, processor), or give agent=")
        return self.agent


class ScreenSpotPro(ScreenSpotV2):
    """ScreenSpot-Pro: small elements of professional software on large screens (arXiv 2504.07981); as `ScreenSpotV2`."""

    name = "screenspot-pro"
    reader = staticmethod(read_pro)
    facets = ("group", "application", "platform", "kind")


def _grounding(agent: AgentFormat) -> AgentFormat:
    """The format with its prompt for grounding, where it has one."""
    return get_format(agent.name, **GROUNDING[agent.name]) if agent.name in GROUNDING else agent
