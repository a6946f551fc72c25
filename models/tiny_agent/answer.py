"""Ask the tiny agent for the next step, without mmkv, and judge what it says."""

from __future__ import annotations

import re

import torch

from mmkv.models.tiny_agent.sessions import Session, Task

POINT = re.compile(r"click\(point='<point>(-?\d+) (-?\d+)</point>'\)")
TYPED = re.compile(r"type\(content='([^']*)'\)")


def turns(session: Session, k: int, responses: list[str]) -> list[dict]:
    """The chat for step `k`: screens and clauses so far with what was answered, then the current ones."""
    chat: list[dict] = []
    for i in range(k + 1):
        parts = [{"type": "image"}, {"type": "text", "text": session.steps[i].task.clause}]
        chat.append({"role": "user", "content": parts})
        if i < k:
            chat.append({"role": "assistant", "content": responses[i]})
    return chat


def prepare(processor, chat: list[dict], images: list):
    """Model inputs for a chat; images uint8 `[H, W, 3]` in order."""
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    return processor(text=[text], images=images, return_tensors="pt")


@torch.no_grad()
def reply(model, processor, inputs) -> str:
    """Greedy answer in the agent grammar."""
    inputs = inputs.to(model.device)
    out = model.generate(**inputs, do_sample=False)
    return processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def run(model, processor, session: Session, images: list | None = None, given: bool = False) -> list[str]:
    """Answers to all steps.

    Args:
        images: other screens than the session's own.
        given: the history holds the right answers, not the agent's own.
    """
    images = images or [step.image for step in session.steps]
    answers: list[str] = []
    for k in range(len(session.steps)):
        past = [step.task.response for step in session.steps] if given else answers
        answers.append(reply(model, processor, prepare(processor, turns(session, k, past), images[: k + 1])))
    return answers


def hits(task: Task, answer: str) -> bool:
    """Whether the first click lies in the target; False without a click."""
    clicks = POINT.findall(answer)
    return bool(clicks) and task.target is not None and task.target.holds(*map(int, clicks[0]))


def right(task: Task, answer: str) -> bool:
    """Whether the action does what was asked: the click hits, the typed text is the right one, the rest is equal."""
    if task.target is None and not task.typed:
        return answer.split("Action:")[-1] == task.response.split("Action:")[-1]
    typed = TYPED.findall(answer)
    return (task.target is None or hits(task, answer)) and typed == ([task.typed] if task.typed else [])
