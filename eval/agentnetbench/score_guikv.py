"""GUI-KV's way of scoring a step: the first predicted action against the first true one (arXiv 2510.00536).

Spec: rules of SalesforceAIResearch/GUI-KV, `eval/agentnetbench_eval.py`. Its numbers do not compare with the other scorers'.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mmkv.eval.agentnetbench.data import Step, Target
from mmkv.eval.agentnetbench.match import Action, action_score, kind
from mmkv.eval.agentnetbench.rules import Rules
from mmkv.eval.agentnetbench.score import Score

# ctrl, control, cmd and command are one key on both sides: GUI-KV's own converter renames ctrl to control, which never matches
RULES = Rules(one_name=True)


def step_score(actions: Sequence[Action], step: Step) -> Score:
    """Score of the first predicted action; the type that it is booked under is the first true action's.

    Where the types differ, the first alternative that begins with the predicted type stands in for the ground truth (not
    counted as an alternative match, as there); where the score is 0, the best first action of the alternatives counts.

    Args:
        actions: predicted (type, value); all but the first are ignored.
        step: holds the true actions.
    """
    if not actions:
        return Score(0.0, {})
    first = actions[0]
    candidates = [option[0] for option in step.alternatives if option]
    true = step.targets[0]
    if kind(*first, RULES) != _kind(true):
        true = next((option for option in candidates if _kind(option) == kind(*first, RULES)), true)
    best = Score(action_score(first, true, RULES), {})
    if best.total == 0:
        for i, option in enumerate(step.alternatives):
            score = action_score(first, option[0], RULES) if option else 0.0
            if score > best.total:
                best = Score(score, {}, i)
    return replace(best, by_type={step.targets[0].type: best.total})


def _kind(target: Target) -> str:
    return kind(target.type, target.value, RULES)
