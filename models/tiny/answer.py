"""Ask the tiny model: open questions by greedy decoding, multiple choice by option likelihood."""

from __future__ import annotations

import torch

from mmkv.models.tiny.words import EASY_FORMS, STRESS_FORMS


def question_forms() -> list[str]:
    """One example of every form of question the model was trained on; any known colour, shape, digit or word fits."""
    forms = [form for group in (EASY_FORMS, STRESS_FORMS) for form in sum(group.values(), [])]
    return list(dict.fromkeys(form.format(c="red", n="circle", s="small", c2="blue", n2="star") for form in forms))


def unknown_words(processor, text: str) -> list[str]:
    """Words of a text that the tokenizer maps to <unk>, in order, without repeats."""
    core = processor.tokenizer.backend_tokenizer
    pieces = core.pre_tokenizer.pre_tokenize_str(core.normalizer.normalize_str(text))
    known = processor.tokenizer.get_vocab()
    return list(dict.fromkeys(word for word, _ in pieces if word not in known))


def prepare(processor, frames, question: str, fps: float = 2.0):
    """Model inputs for a question after a video; frames uint8 [T, H, W, 3], sampled at `fps` per second."""
    parts = [{"type": "video"}, {"type": "text", "text": question}]
    text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    about = {"fps": fps, "total_num_frames": len(frames), "frames_indices": list(range(len(frames)))}
    return processor(text=[text], videos=[frames], video_metadata=[about], return_tensors="pt")


@torch.no_grad()
def reply(model, processor, inputs) -> str:
    """Greedy answer to prepared inputs, e.g. "top left"."""
    inputs = inputs.to(model.device)
    out = model.generate(**inputs, do_sample=False, max_new_tokens=4)
    return processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def ask(model, processor, frames, question: str, fps: float = 2.0) -> str:
    """Greedy answer to a question about a video."""
    return reply(model, processor, prepare(processor, frames, question, fps))


class _Forced:
    """A logits processor that makes `generate` write given ids and adds up their log-probabilities."""

    def __init__(self, ids, prompt):
        self.ids, self.prompt, self.total = ids, prompt, 0.0

    def __call__(self, input_ids, scores):
        token = self.ids[input_ids.shape[1] - self.prompt]
        self.total += torch.log_softmax(scores[0].float(), -1)[token].item()
        forced = torch.full_like(scores, float("-inf"))
        forced[:, token] = 0
        return forced


@torch.no_grad()
def choose(model, processor, inputs, options) -> tuple[str, list[float]]:
    """The most likely option and each option's mean log-probability per word. The options are never in the prompt."""
    inputs = inputs.to(model.device)
    coded = [processor.tokenizer(option, add_special_tokens=False)["input_ids"] for option in options]
    if all(len(ids) == 1 for ids in coded):  # one prefill serves them all
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
        )
        first = torch.log_softmax(out.logits[0][0].float(), -1)
        scores = [first[ids[0]].item() for ids in coded]
    else:
        scores = []
        for ids in coded:
            forced = _Forced(ids, inputs["input_ids"].shape[1])
            model.generate(**inputs, do_sample=False, max_new_tokens=len(ids), logits_processor=[forced])
            scores.append(forced.total / len(ids))
    return options[max(range(len(scores)), key=scores.__getitem__)], scores
