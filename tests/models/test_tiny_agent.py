"""The bundled agent: small, loads offline, writes the agent grammar, and hits what held-out screens ask for."""

import inspect
import math
import pathlib

import numpy as np
import pytest
import torch

from mmkv.agents import PastStep, get_format
from mmkv.models import tiny_agent
from mmkv.models.tiny_agent import answer, build, fast, packing, screens, sessions
from mmkv.models.tiny_agent.words import CLAUSES, COLOURS, RECALLS, vocabulary, words_of


@pytest.fixture(scope="module")
def loaded():
    return tiny_agent.load()


@pytest.fixture(scope="module")
def played(loaded):
    """Twelve held-out sessions with the agent's own answers."""
    kept = [sessions.make_session(sessions.HELD_OUT + 10_000 + i) for i in range(12)]
    return [(session, answer.run(*loaded, session)) for session in kept]


def test_size(loaded):
    model, processor = loaded
    assert sum(p.numel() for p in model.parameters()) <= 5_000_000
    assert sum(f.stat().st_size for f in pathlib.Path(tiny_agent.path()).rglob("*")) < 12 * 2**20
    assert model.config.agent_format == "tiny" and not model.training
    assert processor.tokenizer.get_vocab() == {word: i for i, word in enumerate(vocabulary())}


def test_tokenizer_gives_the_grammar_back():
    tokenizer = build.make_tokenizer()
    text = "Thought: the field is red\nAction: click(point='<point>72 40</point>')\n\ntype(content='cat')"
    words = ["thought:", "the", "field", "is", "red", "action:", "click(point='<point>", "72", "40</point>", "')"]
    words += ["type(content='", "cat", "')"]
    assert words_of(text) == words
    assert tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]) == words
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer("click the giraffe")["input_ids"][-1] == tokenizer.unk_token_id
    for seed in range(40):
        for step in sessions.make_session(seed).steps:
            for said in (step.task.response, step.task.clause):
                ids = tokenizer(said)["input_ids"]
                assert tokenizer.decode(ids) == said and tokenizer.unk_token_id not in ids


def test_session_by_hand():
    """Seed 4, as read off its picture: a yellow "ice" on the first screen and a red "box" on the third one, seen nowhere else."""
    session = sessions.make_session(4)
    assert session.size == (128, 96) and all(step.image.shape == (96, 128, 3) for step in session.steps)
    clauses = ["scroll up", "click what was yellow", "type 7 into the field", "click what was red", "finish"]
    assert session.instruction == ", then ".join(clauses)
    assert [step.task.response for step in session.steps] == [
        "Thought: scroll up\nAction: scroll(point='<point>64 48</point>', direction='up')",
        "Thought: the ice is pink\nAction: click(point='<point>64 56</point>')",
        "Thought: the field is green\nAction: click(point='<point>24 32</point>')\n\ntype(content='7')",
        "Thought: the box is pink\nAction: click(point='<point>64 72</point>')",
        "Thought: finish\nAction: finished(content='done')",
    ]
    again = sessions.make_session(4)
    assert all((a.image == b.image).all() for a, b in zip(session.steps, again.steps))
    with pytest.raises(ValueError, match="steps=1"):
        sessions.make_session(4, 1)


def test_sessions_are_unambiguous_and_drawn_where_they_say():
    """Over many sessions: one element fits each clause, boxes do not touch, and icons have their colour in the box."""
    kinds = set()
    for seed in range(120):
        session = sessions.make_session(seed)
        for k, step in enumerate(session.steps):
            task, words = step.task, step.task.clause.split()
            kinds.add(task.kind)
            names = [e.name for e in step.elements]
            assert len(set(names)) == len(names)
            told = " ".join(s.task.clause + " " + s.task.thought for s in session.steps[:k]).split()
            earlier = [e for s in session.steps[:k] for e in s.elements]
            if task.kind == "recall":
                (shown,) = {e.name for e in earlier if e.colour == words[-1]}
                assert not any(e.colour == words[-1] for e in step.elements) and task.target.name == shown
                assert words[-1] not in told
            if task.kind == "recall digit":
                assert [e.name for e in earlier if e.name.isdigit()] == [task.typed]
                assert not any(n.isdigit() for n in names)
            if task.kind == "colour":
                assert [e for e in step.elements if e.colour == words[2]] == [task.target]
            for e in step.elements:
                left, top, right, bottom = e.box
                assert left >= 0 and top >= 9 and right <= session.size[0] and bottom <= session.size[1]
                assert e.holds(*e.at) and math.dist(e.at, (e.x, e.y)) <= math.sqrt(32)
                inside = step.image[round(top) : round(bottom), round(left) : round(right)].reshape(-1, 3).astype(int)
                assert np.abs(inside - COLOURS[e.colour]).sum(1).min() < 30
    assert kinds == set(CLAUSES) - {"read"}  # it would tell the digit


def test_actions_of_a_step():
    element = screens.Element("field", "red", 64, 48, 46, 20, 8)
    task = sessions.Task("fill", "type cat into the field", "", element, "cat")
    click, write = sessions.Step(np.zeros((96, 128, 3), np.uint8), (element,), task).actions
    assert click == dict(type="click", params={"point": (0.5, 0.5)}, box=(41 / 128, 38 / 96, 46 / 128, 20 / 96))
    assert write == dict(type="write", params={"text": "cat"}, box=None)
    assert element.box == (41, 38, 87, 58) and element.holds(41, 58) and not element.holds(40.5, 48)


def test_packed_rows_equal_the_library(loaded, monkeypatch):
    """In float32 a row with branches gives the library's positions and logits of the plain chat on its trunk."""
    model, processor = loaded
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    row = packing.Row(1000)
    assert row.add_session(np.random.default_rng(1), 3, 3, {})
    trunk = [i for i, branch in enumerate(row.branch) if branch == 0]
    ids = torch.tensor(row.ids)[trunk]
    pixels = dict(processor.image_processor(row.images, return_tensors="pt"))
    about = {"mm_token_type_ids": (ids == model.config.image_token_id).long()[None], "input_ids": ids[None]}
    wanted = inspect.signature(model.model.get_rope_index).parameters  # 5.2 knows no types
    rope = {name: value for name, value in about.items() if name in wanted}
    known = model.model.get_rope_index(**rope, image_grid_thw=pixels["image_grid_thw"])[0][:, 0]
    assert (known == torch.tensor(row.positions)[trunk].T).all()
    with torch.no_grad():
        theirs = model(**pixels, **rope).logits[0]
        pictures = [torch.from_numpy(image[None]).float() / 127.5 - 1 for image in row.images]
        features = torch.cat([fast.see(model.model.visual, picture)[0] for picture in pictures])
        bias = packing.visible(torch.tensor([row.session]), torch.tensor([row.branch]))
        positions = torch.tensor([row.positions]).permute(2, 0, 1)
        places, packed = torch.tensor(row.places), torch.tensor([row.ids])
        hidden = fast.read(model.model.language_model, packed, features, places, positions, bias)[0][0, trunk]
    assert torch.allclose(hidden @ model.lm_head.weight.T, theirs, atol=2e-2, rtol=1e-3)


def test_branches_see_the_trunk_and_themselves():
    """Trunk a b, leaf c d, trunk e, another session f: by hand."""
    seen = packing.visible(torch.tensor([[0, 0, 0, 0, 0, 1]]), torch.tensor([[0, 0, 1, 2, 0, 0]]))[0, 0] == 0
    assert seen.int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_answers_parse(played):
    reader = get_format("tiny").for_processor(build.make_processor())
    for session, answers in played:
        for step, text in zip(session.steps, answers):
            parsed = reader.parse(text, session.size)
            assert not parsed.problems and len(parsed.actions) == len(step.actions)
            if answer.hits(step.task, text):
                left, top, width, height = step.actions[0]["box"]
                x, y = parsed.actions[0].point
                assert left <= x <= left + width and top <= y <= top + height


def test_format_asks_as_it_was_trained(loaded):
    """The chat of the agent format is the chat of the evaluation, word for word."""
    session = sessions.make_session(7)
    past = [step.task.response for step in session.steps[:2]]
    steps = [PastStep(step.image, said) for step, said in zip(session.steps, past)]
    chat = get_format("tiny").messages(session.instruction, steps, session.steps[2].image)
    template = loaded[1].apply_chat_template
    assert template(chat, add_generation_prompt=True) == template(
        answer.turns(session, 2, past), add_generation_prompt=True
    )


def test_it_hits_what_is_asked(played):
    """Current screens and earlier ones; guessing an element of the screen hits one in four or five."""
    done = [(s.task, answer.right(s.task, text)) for session, texts in played for s, text in zip(session.steps, texts)]
    now = [ok for task, ok in done if task.kind not in RECALLS]
    before = [ok for task, ok in done if task.kind in RECALLS]
    assert len(now) >= 30 and len(before) >= 10
    assert np.mean(now) >= 0.85 and np.mean(before) >= 0.6
