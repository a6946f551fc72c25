"""AgentNetBench as a `Task`: trajectories in, one sample per step, metrics of all steps out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkv.agents import AgentFormat, format_for, get_format
from mmkv.agents.opencua_faithful import extract_actions, relative_code
from mmkv.eval.agentnetbench.actions import from_parsed, from_parsed_guikv
from mmkv.eval.agentnetbench.data import Step, Trajectory, read_folder
from mmkv.eval.agentnetbench.match import Action
from mmkv.eval.agentnetbench.metrics import GROUPS, metrics
from mmkv.eval.agentnetbench.prompts import messages_at, size_of
from mmkv.eval.agentnetbench.rules import NAMED
from mmkv.eval.agentnetbench.score import Score, step_score
from mmkv.eval.agentnetbench.score_guikv import step_score as guikv_score
from mmkv.eval.digest import digest
from mmkv.eval.media import Media, read_image
from mmkv.eval.task import Prompt, Sample, Task, by_facet

VERSION = 1
SCORERS = (*NAMED, "gui_kv")
SCREENSHOTS = {"gui_kv": 5}  # 3 elsewhere
HISTORIES = ("truth", "own")


class AgentNetBench(Task):
    """Offline steps of GUI agents (OpenCUA, arXiv 2508.09123).

    With history "truth" every step is asked on its own: earlier steps are told as the annotator described them. With "own" the
    steps of a trajectory run in order and the model reads its own earlier answers, as GUI-KV (arXiv 2510.00536) does it.

    Args:
        data: folder of the trajectories' `*.json`.
        images: folder of the screenshots; `images/` in `data` by default.
        scorer: "corrected" (default), "official" (what published numbers were made with), "official-2026" (the same file
            since OpenCUA pull request 56), "gui_kv"; see `rules.Rules`.
        history: "truth" or "own"; by default "own" for the scorer gui_kv, "truth" for others.
        screenshots: pictures in the prompt, the current one included; 3 by default, 5 for gui_kv.
        agent: format's name or instance; by default the one that the model was trained on.
        max_new_tokens: longest answer, in tokens; 1000 as officially.

    Raises:
        ValueError: an unknown scorer or history, or no whole number of screenshots from 1.
        FileNotFoundError: no trajectories there.
    """

    name = "agentnetbench"

    def __init__(
        self,
        data: str | Path,
        images: str | Path | None = None,
        scorer: str = "corrected",
        history: str | None = None,
        screenshots: int | None = None,
        agent: AgentFormat | str | None = None,
        max_new_tokens: int = 1000,
    ):
        if scorer not in SCORERS:
            raise ValueError(f"scorer {scorer!r}; possible are {', '.join(SCORERS)}")
        self.rules_name = scorer
        self.scorer = f"agentnetbench-{scorer}-{VERSION}"  # type: ignore[misc]
        self.history = history or ("own" if scorer == "gui_kv" else "truth")
        if self.history not in HISTORIES:
            raise ValueError(f"history {history!r}; possible are {', '.join(HISTORIES)}")
        self.screenshots = SCREENSHOTS.get(scorer, 3) if screenshots is None else screenshots
        if type(self.screenshots) is not int or self.screenshots < 1:
            raise ValueError(f"screenshots={screenshots!r}; possible are whole numbers from 1 (the current one)")
        self.agent = get_format(agent) if isinstance(agent, str) else agent
        self.given = self.agent
        self.max_new_tokens = max_new_tokens
        self.trajectories = read_folder(data, images)
        pictures = [step.image for trajectory in self.trajectories for step in trajectory.steps]
        self.digest = digest(Path(data).glob("*.json"), pictures)

    @property
    def follows(self) -> bool:
        return self.history == "own"

    def begin(self, model: Any, processor: Any) -> None:
        self.agent = (self.given or format_for(model)).for_processor(processor)

    def settings(self) -> dict[str, Any]:
        return dict(
            data=self.digest,
            trajectories=len(self.trajectories),
            steps=sum(len(t.steps) for t in self.trajectories),
            scorer=self.rules_name,
            history=self.history,
            screenshots=self.screenshots,
            agent=repr(self.given) if self.given else "by model",
        )

    def samples(self) -> list[Sample]:
        return [sample for trajectory in self.trajectories for sample in self._samples(trajectory)]

    def _samples(self, trajectory: Trajectory) -> list[Sample]:
        if trajectory.problem:
            facts = dict(trajectory=trajectory.task_id, step=None, milestone=False, type=None)
            return [Sample(trajectory.task_id, trajectory.task_id, facts, skipped=trajectory.problem)]
        return [self._sample(trajectory, step) for step in trajectory.steps]

    def _sample(self, trajectory: Trajectory, step: Step) -> Sample:
        before = trajectory.steps[max(0, step.index - self.screenshots + 1) : step.index]
        kind = step.targets[0].type if step.targets else None
        facts = dict(
            trajectory=trajectory.task_id,
            step=step.index,
            milestone=step.milestone,
            type=kind,
            group=next((group for group, kinds in GROUPS.items() if kind in kinds), None),
            history_images_missing=sum(not past.image.is_file() for past in before),
        )
        return Sample(
            f"{trajectory.task_id}/{step.index}",
            trajectory.task_id,
            facts,
            [[target.type, target.value] for target in step.targets],
            dict(trajectory=trajectory, index=step.index),
            step.problem or None,
        )

    def _messages(self, sample: Sample) -> tuple[list[dict[str, Any]], list[Path]]:
        if self.agent is None:
            raise ValueError("the agent's format is not known yet: call begin(model, processor), or give agent=")
        group: Mapping[str, str] = sample.data.get("past", {})
        own = {int(key.rpartition("/")[2]): answer for key, answer in group.items()}
        return messages_at(sample.data["trajectory"], sample.data["index"], self.agent, self.screenshots, own)

    def media(self, sample: Sample) -> Media:
        return Media(images=tuple(read_image(path) for path in self._messages(sample)[1]))

    def prompt(self, sample: Sample, media: Media) -> Prompt:
        return Prompt(self._messages(sample)[0])

    def actions(self, response: str, step: Step) -> tuple[list[Action], list[str]]:
        """Predicted actions, and what of the response could not be read.

        The official scorers read OpenCUA's text by the official code's own rules; other formats have no official reader.
        """
        if self.agent is None:
            raise ValueError("the agent's format is not known yet: call begin(model, processor), or give agent=")
        size = size_of(step.image)
        if self.rules_name.startswith("official") and self.agent.name == "opencua":
            try:
                return extract_actions(relative_code(response, size, self.agent.resize)), []
            except ValueError as error:
                return [], [str(error)]
        parsed = self.agent.parse(response, size)
        convert = from_parsed_guikv if self.rules_name == "gui_kv" else from_parsed
        return convert(parsed.actions), list(parsed.problems)

    def score(self, sample: Sample, response: str) -> dict[str, Any]:
        step = sample.data["trajectory"].steps[sample.data["index"]]
        said, problems = self.actions(response, step)
        found: Score = (
            guikv_score(said, step) if self.rules_name == "gui_kv" else step_score(said, step, NAMED[self.rules_name])
        )
        return dict(
            score=found.total,
            correct=found.total >= 1.0,
            answer=[[name, value] for name, value in said],
            by_type=found.by_type,
            alternative=found.alternative,
            problems=problems,
        )

    def summary(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        numbers = metrics(rows)
        means = {"step score": numbers["average_score"], **numbers["group_scores"]}
        unread = sum(not row["answer"] for row in rows)
        return dict(
            headline={label: 100 * value for label, value in means.items() if value is not None},
            by=by_facet(rows, ("type", "group", "milestone")),
            no_action=unread,
            **numbers,
        )

    def template(self) -> str:
        if self.given is None:
            return f"{self.history} {self.screenshots}"
        return repr(self.given.messages("{instruction}", [], "{screenshot}"))
