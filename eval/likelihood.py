"""Multiple choice by likelihood: which option's text would the model say next?"""

from __future__ import annotations

import copy
from typing import Any

import torch

PLAIN = dict(do_sample=False, repetition_penalty=1.0)  # some models' own settings would change the likelihoods


class _Forced:
    """A logits processor that makes `generate` write given ids and adds up their log-probabilities."""

    def __init__(self, ids: list[int], prompt: int):
        self.ids, self.prompt, self.total = ids, prompt, 0.0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = self.ids[input_ids.shape[1] - self.prompt]
        self.total += torch.log_softmax(scores[0].float(), -1)[token].item()
        forced = torch.full_like(scores, float("-inf"))
        forced[:, token] = 0
        return forced


def most_likely(model: Any, processor: Any, inputs: dict, cache: Any, choices: dict[str, str]) -> tuple[str, dict]:
    """The choice whose text has the highest mean log-probability per token, and every choice's score.

    Args:
        inputs: of the whole prompt, without pixels.
        cache: holds all but the end of the prompt; used up.
        choices: response -> text; ties go to the first.

    Raises:
        ValueError: no choices, or one without tokens.
    """
    coded = {name: processor.tokenizer(text, add_special_tokens=False)["input_ids"] for name, text in choices.items()}
    if not coded or not all(coded.values()):
        raise ValueError(f"choices {choices}: each needs a text that the tokenizer knows")
    length = inputs["input_ids"].shape[1]
    # the prompt's end is read once; the cache then holds the whole prompt
    out = model.generate(
        **inputs, past_key_values=cache, **PLAIN, max_new_tokens=1, output_logits=True,
        return_dict_in_generate=True,
    )  # fmt: skip
    first = torch.log_softmax(out.logits[0][0].float(), -1)
    scores = {}
    for name, ids in coded.items():
        total = first[ids[0]].item()
        if len(ids) > 1:
            total += _rest(model, inputs, cache, ids, length)
        scores[name] = total / len(ids)
    rounded = {name: round(score, 4) for name, score in scores.items()}
    return max(scores, key=scores.__getitem__), dict(option_scores=rounded, new_tokens=max(map(len, coded.values())))


def _rest(model: Any, inputs: dict, cache: Any, ids: list[int], length: int) -> float:
    """Sum of the log-probabilities of a choice's tokens behind the first."""
    tail = inputs["input_ids"].new_tensor([ids[:1]])
    longer = dict(inputs)
    longer["input_ids"] = torch.cat([inputs["input_ids"], tail], 1)
    for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in inputs:
            longer[name] = torch.cat([inputs[name], torch.full_like(tail, fill)], 1)
    forced = _Forced(ids[1:], length + 1)
    model.generate(
        **longer, past_key_values=copy.deepcopy(cache), **PLAIN, max_new_tokens=len(ids) - 1,
        logits_processor=[forced],
    )  # fmt: skip
    return forced.total
