"""Score of one step: all predicted actions against the true ones and their alternatives, as `ActionEvaluator` of OpenCUA."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mmkv.eval.agentnetbench.data import KEYS, Step, Target
from mmkv.eval.agentnetbench.match import ENTER, Action, action_score, kind
from mmkv.eval.agentnetbench.rules import Rules


@dataclass(frozen=True)
class Score:
    """What one step scored.

    Args:
        total: 0 to 1, the plain mean of `by_type`.
        by_type: score of each action type among the true actions used; empty where nothing was predicted.
        alternative: index of the alternative list that gave the total, -1 for the ground truth itself.
    """

    total: float
    by_type: dict[str, float]
    alternative: int = -1


def step_score(actions: Sequence[Action], step: Step, rules: Rules) -> Score:
    """The best of the ground truth and its alternatives; an alternative must be strictly better.

    Args:
        actions: predicted (type, value) in order; nothing of them or of the step is changed.
        step: holds the true actions.
        rules: what is in force.
    """
    best = list_score(actions, step.targets, rules)
    for i, option in enumerate(step.alternatives):
        if best.total >= 1.0:
            break
        found = list_score(actions, option, rules)
        if found.total > best.total:
            best = replace(found, alternative=i)
    # an alternative that equals the ground truth is no alternative match
    same = best.alternative >= 0 and step.alternatives[best.alternative] == step.targets
    return replace(best, alternative=-1) if same else best


def list_score(actions: Sequence[Action], targets: Sequence[Target], rules: Rules) -> Score:
    """Score of predicted actions against one list of true ones."""
    if not actions or not targets:
        return Score(0.0, {})
    true = merged_targets(targets)
    said = merged_actions(actions, rules)
    share = len(true) / len(said) if rules.surplus and len(said) > len(true) else 1.0
    if not rules.in_order and true[0].type == "terminate":
        true = true[:1]  # the official code looks at nothing else then
    scores = _aligned(said, true, rules) if rules.in_order else _by_place(said, true, rules)
    counts = Counter(target.type for target in true)
    booked: dict[str, float] = {}
    for target, score in zip(true, scores):
        if score is not None:
            booked[target.type] = booked.get(target.type, 0.0) + score
    by_type = {name: total / counts[name] * share for name, total in booked.items()}
    return Score(sum(by_type.values()) / len(by_type) if by_type else 0.0, by_type)


def _by_place(said: Sequence[Action], true: Sequence[Target], rules: Rules) -> Sequence[float | None]:
    """Score of each true action against the predicted one in its place; None where the official code books nothing."""
    if true[0].type == "terminate":
        return [float(said[0] == ("terminate", true[0].value))]
    names = [kind(target.type, target.value, rules) for target in true]
    if kind(*said[0], rules) not in names:
        return [0.0] * len(true)
    scores: list[float | None] = []
    for i, target in enumerate(true):
        met = i < len(said) and kind(*said[i], rules) == names[i]
        # a terminate that is met behind the first place is neither credited nor counted
        credited = action_score(said[i], target, rules) if met and target.type != "terminate" else None
        scores.append(credited if met else 0.0)
    return scores


def merged_targets(targets: Sequence[Target]) -> list[Target]:
    """True actions with write and a following enter (press or hotkey) made one write that ends with a newline."""
    out, i = [], 0
    while i < len(targets):
        enters = _enters([(target.type, target.value) for target in targets[i : i + 2]], KEYS)
        out.append(replace(targets[i], value=targets[i].value + "\n") if enters else targets[i])
        i += 1 + enters
    return out


def merged_actions(actions: Sequence[Action], rules: Rules) -> list[Action]:
    """Predicted actions with write and a following press(enter) made one write; hotkey(enter) too where the rules say so."""
    out, i = [], 0
    while i < len(actions):
        enters = _enters(actions[i : i + 2], KEYS if rules.enter_by_hotkey else ("press",))
        out.append(("write", actions[i][1] + "\n") if enters else actions[i])
        i += 1 + enters
    return out


def _enters(pair: Sequence[Action], by: Sequence[str]) -> bool:
    """Whether two actions are a write and the enter key alone, pressed by one of the types `by`."""
    if len(pair) < 2 or pair[0][0].lower() != "write" or pair[1][0].lower() not in by:
        return False
    keys = pair[1][1]
    return isinstance(keys, list | tuple) and len(keys) == 1 and str(keys[0]).lower() in ENTER


def _aligned(said: Sequence[Action], true: Sequence[Target], rules: Rules) -> Sequence[float | None]:
    """Score of each true action in the order-keeping pairing with the largest sum."""
    best: list[list[tuple[float, list[float]]]] = [[(0.0, [])] * (len(said) + 1)]
    for i, target in enumerate(true):
        row = [(0.0, [0.0] * (i + 1))]
        for j, action in enumerate(said):
            here = action_score(action, target, rules)
            paired = (best[i][j][0] + here, [*best[i][j][1], here])
            skipped = (best[i][j + 1][0], [*best[i][j + 1][1], 0.0])
            row.append(max(paired, row[j], skipped, key=lambda option: option[0]))
        best.append(row)
    return best[-1][-1][1]
