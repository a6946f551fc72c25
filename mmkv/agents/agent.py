"""`Agent`: a GUI agent that sees one screenshot after another and keeps the KV of those before."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from mmkv.agents.action import Action, PastStep
from mmkv.agents.encoding import Encoder
from mmkv.agents.formats import AgentFormat, format_for, get_format
from mmkv.agents.history import recent
from mmkv.agents.memory import Memory
from mmkv.agents.prompt import content_of, picture
from mmkv.models import adapter_for

ONE_ANSWER = ("num_beams", "num_return_sequences", "num_beam_groups")


@dataclass(frozen=True)
class Step:
    """What an agent answered to a screenshot. Nothing of it was executed.

    Args:
        text: the model's output, unchanged.
        thought: its reasoning, "" without any.
        actions: what it asks for.
        problems: what of the output could not be read, one line each.
        screenshots: pictures in the prompt, the current one included.
        seconds: from the screenshot to the answer.
        kv_bytes: what the cache holds after the step.
        reused: tokens of the prompt whose KV was there already.
        new: tokens of the prompt that were encoded.
        tokens: of the answer.
        note: what was lost of the KV of earlier steps and why; "" where the step only went on.
        size: width and height of the screenshot, for `to_pyautogui`.
    """

    text: str
    thought: str = ""
    actions: tuple[Action, ...] = ()
    problems: tuple[str, ...] = ()
    screenshots: int = 1
    seconds: float = 0.0
    kv_bytes: int = 0
    reused: int = 0
    new: int = 0
    tokens: int = 0
    note: str = ""
    size: tuple[int, int] = (0, 0)


class Agent:
    """A session of a GUI agent. Made by `mmkv.agent`.

    Each step's prompt is what the format asks for, with the newest screenshots. What the cache holds of it is not encoded again:
    ids and pictures (by their content) are compared, the cache is cut to the part that agrees and the rest is fed. A wrapped
    model stores the KV of earlier screenshots as its methods say, `mmkv.wrap(model, cache=[GUIKV(budget=0.2)])` a fifth of it.

    Args:
        model: a Qwen2-VL, Qwen2.5-VL, Qwen3-VL or OpenCUA model, wrapped or not.
        processor: its processor.
        format: an `AgentFormat`, its name, or None for the one that the model says (`config.agent_format`) or is known by.
        screenshots: pictures in a prompt, the current one included; older steps are told as text.
        slack: pictures that there may be more, so that the window moves once in `slack + 1` steps: see `mmkv.agents.recent`.
        max_new_tokens: of an answer.
        instruction: the task; or give it to the first `step`.
        options: of `generate` (`do_sample`, `temperature` ...); greedy without.

    Raises:
        ValueError: no format is known, an option out of range, a model whose pictures have no grid, several answers at a time.
    """

    def __init__(
        self, model, processor, *, format: AgentFormat | str | None = None, screenshots: int = 5, slack: int = 0,
        max_new_tokens: int = 400, instruction: str | None = None, **options,
    ):  # fmt: skip
        recent([], screenshots, slack)  # which says what is wrong with the number
        if type(max_new_tokens) is not int or max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens!r}; possible are whole numbers from 1")
        for name in ONE_ANSWER:
            if options.get(name, 1) != 1:
                raise ValueError(f"{name}={options[name]!r}; an agent has one answer to go on from: leave it out")
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        if format is None or isinstance(format, str):
            format = format_for(base) if format is None else get_format(format)
        if not isinstance(format, AgentFormat):
            raise TypeError(f"format={format!r}; possible are an AgentFormat, a name, or None")
        self.model, self.processor = model, processor
        self.format = format.for_processor(processor)
        self.screenshots, self.slack = screenshots, slack
        self.options = {"do_sample": False, **options, "max_new_tokens": max_new_tokens}
        self.encoder = Encoder(adapter_for(base), processor)
        self.memory = Memory(base)
        self.reset(instruction)

    def reset(self, instruction: str | None = None) -> None:
        """Begin anew: no steps, no KV, another task perhaps."""
        self.instruction = _checked(instruction) if instruction is not None else None
        self.past: list[PastStep] = []
        self.memory.forget()
        self.encoder.forget()

    @property
    def kv_bytes(self) -> int:
        """Bytes that the cache of the session holds."""
        return self.memory.bytes

    def step(self, screenshot, instruction: str | None = None) -> Step:
        """Ask for the next action.

        Args:
            screenshot: the screen now: a PIL image, a path, or uint8 `[H, W, 3]`; its size may change between steps.
            instruction: the task; None for that of the steps before.

        Raises:
            ValueError: no instruction yet, or an empty or broken screenshot; the session is as it was.
        """
        begun = time.perf_counter()
        task = self.instruction if instruction is None else _checked(instruction)
        if task is None:
            raise ValueError("no instruction yet; give one to the first step or to mmkv.agent(...)")
        now = picture(screenshot)
        self.format.resize.size(*now.size)
        past = recent(self.past, self.screenshots, self.slack)
        prompt, inputs = self.encoder.encode(self.format.messages(task, past, now))
        reused, note = self.memory.fit(prompt)
        try:
            answer = self._generate(prompt, inputs, reused)
        except BaseException:
            self.memory.forget("the step before failed")  # perhaps half-way through a forward
            raise
        text = self.processor.tokenizer.decode(answer, skip_special_tokens=True).strip()
        parsed = self.format.parse(text, now.size)
        self.instruction = task
        self.past = recent([*past, PastStep.of(parsed, now)], self.screenshots, self.slack)
        self.encoder.keep_only({content_of(step.screenshot) for step in self.past if step.screenshot is not None})
        return Step(
            text, parsed.thought, parsed.actions, parsed.problems, len(prompt.spans), time.perf_counter() - begun,
            self.kv_bytes, reused, len(prompt.ids) - reused, len(answer), note, now.size,
        )  # fmt: skip

    def _generate(self, prompt, inputs, reused: int) -> list[int]:
        """Ids of the answer; the cache holds the prompt and the answer then."""
        device = self.model.device
        given = {name: value.to(device) for name, value in inputs(reused).items()}
        ids = torch.tensor([prompt.ids], device=device)
        out = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=self.memory.cache,
            **given,
            **self.options,
        )
        sequence = out if isinstance(out, torch.Tensor) else out.sequences
        answer = sequence[0, len(prompt.ids) :].tolist()
        self.memory.keep(prompt, answer)
        return answer


def _checked(instruction) -> str:
    if not isinstance(instruction, str) or not instruction.strip():
        raise ValueError(f"instruction={instruction!r}; possible is a text")
    return instruction


def agent(model, processor, **options) -> Agent:
    """A GUI agent that keeps the KV of earlier screenshots; options as for `Agent`.

    ```python
    mmkv.wrap(model, cache=[mmkv.cache.GUIKV(budget=0.2)])
    agent = mmkv.agent(model, processor, instruction="Turn on dark mode")
    step = agent.step(screenshot)
    print(step.thought, step.actions, step.kv_bytes)
    ```
    """
    return Agent(model, processor, **options)
