"""Head classes and layer roles: their measures by hand, and what a file may hold."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from mmkv.parts.calibration import (
    HeadClasses,
    Identity,
    LayerRoles,
    attention_selectivity,
    column_variance,
    drafting_layers,
    probabilities,
    structural_heads,
)
from mmkv.parts.probe_rows import evenly

MODEL = Identity("infinity", 3, 4)
CLASSES = HeadClasses(MODEL, ((1, 0), (), (3,)))
ROLES = LayerRoles(MODEL, ((), (2, 0)))


# --- measures


def test_alike_rows_vary_not_and_diagonals_do():
    """Identical rows: 0. A diagonal over n keys: each key's weight is 1 once in n, variance (1/n)(1 - 1/n), summed 1 - 1/n."""
    same = torch.tensor([0.7, 0.2, 0.1, 0.0]).expand(4, 4)
    shifted = torch.eye(4).roll(1, 1)
    got = column_variance(torch.stack([same, shifted, (same + shifted) / 2]))
    assert got.tolist() == pytest.approx([0.0, 0.75, 0.75 / 4], abs=1e-7)


def test_variance_does_not_know_the_order_of_queries():
    attention = torch.rand(2, 9, 30).softmax(-1)
    assert torch.allclose(column_variance(attention), column_variance(attention[:, torch.randperm(9)]))


def test_selectivity_by_hand():
    """Two queries, three earlier keys and two of the current map: (0.4 + 0.6) / 2 times (0.5 + 0.3) / 2, of the top 2."""
    attention = torch.tensor([[[0.3, 0.1, 0.2, 0.3, 0.1], [0.1, 0.2, 0.1, 0.4, 0.2]]])
    assert attention_selectivity(attention, 2, 2).tolist() == pytest.approx([0.5 * 0.4])
    assert attention_selectivity(attention, 2, 1).tolist() == pytest.approx([0.5 * (0.3 + 0.2) / 2])
    assert attention_selectivity(attention, 2, 9).tolist() == pytest.approx([0.5 * (0.6 + 0.4) / 2])


def test_probabilities():
    query, key = torch.randn(4, 5, 8), torch.randn(2, 7, 8)
    for softcap in (None, 1.5):
        got = probabilities(query, key, 0.3, softcap)
        for head in range(4):
            score = query[head].double() @ key[head // 2].double().T * 0.3
            score = score if softcap is None else softcap * torch.tanh(score / softcap)
            assert torch.allclose(got[head].double(), score.softmax(-1), atol=1e-6)


def test_structural_heads_are_those_that_vary_most_in_the_whole_model():
    variance = torch.tensor([[0.1, 0.9], [0.8, 0.7], [0.2, 0.3]])
    assert structural_heads(variance, 0.5) == ((1,), (0, 1), ())
    assert structural_heads(variance, 1.0) == ((), (), ())
    assert structural_heads(variance, 0.0) == ((0, 1),) * 3
    for wrong in (-0.1, 1.1, True, "half"):
        with pytest.raises(ValueError, match="contextual"):
            structural_heads(variance, wrong)


def test_drafting_layers_by_hand():
    """Scale 1: 1, 2, 3 are -1.22, 0, 1.22 standardized; scale 2: 0, 0, 9 are -0.71, -0.71, 1.41. Scale 0 is left out."""
    index = torch.tensor([[torch.nan, 1.0, 0.0], [torch.nan, 2.0, 0.0], [torch.nan, 3.0, 9.0]])
    assert drafting_layers(index, 0) == ((), (), ())
    assert drafting_layers(index, 1) == ((), (0,), ())
    assert drafting_layers(index, 3) == ((), (0,), (0, 1))
    assert drafting_layers(index, 4) == ((), (0, 1), (0, 1))
    assert drafting_layers(index, 6) == ((), (0, 1, 2), (0, 1, 2))
    for wrong in (7, -1, 1.0, True):
        with pytest.raises(ValueError, match="drafters"):
            drafting_layers(index, wrong)


@pytest.mark.parametrize(
    ("length", "count", "first", "rows"),
    [(10, 3, 0, [1, 5, 8]), (10, 3, 4, [5, 7, 9]), (10, 20, 7, [7, 8, 9]), (6, 2, 2, [3, 5]), (4, 3, 4, [])],
)
def test_evenly(length, count, first, rows):
    assert evenly(length, count, first).tolist() == rows


# --- files


@pytest.mark.parametrize("result", [CLASSES, ROLES], ids=["heads", "layers"])
def test_there_and_back(result, tmp_path):
    result.save(tmp_path / "a.json")
    assert type(result).load(tmp_path / "a.json") == result
    assert type(result).load(tmp_path / "a.json", MODEL) == result
    content = json.loads((tmp_path / "a.json").read_text())
    assert content["model"] == {"model_type": "infinity", "layers": 3, "heads": 4}


def test_groups_are_sorted():
    assert CLASSES.structural == ((0, 1), (), (3,))
    assert ROLES.drafters == ((), (0, 2))


@pytest.mark.parametrize("other", [Identity("var", 3, 4), Identity("infinity", 2, 4), Identity("infinity", 3, 8)])
def test_another_models_file_is_refused(other, tmp_path):
    CLASSES.save(tmp_path / "a.json")
    with pytest.raises(
        ValueError, match="was measured on infinity with 3 layers of 4 KV heads, this model is"
    ) as caught:
        HeadClasses.load(tmp_path / "a.json", other)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "3", "null", '{"kind": "HeadClasses"}', '{"kind": "HeadClasses", "model": {"model_type": "x"}}',
        '{"kind": "HeadClasses", "model": {"model_type": "x", "layers": 1, "heads": 1}}',
        '{"kind": "HeadClasses", "model": {"model_type": "x", "layers": 1, "heads": 1}, "structural": [["0"]]}',
        '{"kind": "HeadClasses", "model": {"model_type": "x", "layers": 1, "heads": 1}, "structural": 3}',
        '{"kind": "HeadClasses", "model": {"model_type": "x", "layers": "1", "heads": 1}, "structural": [[]]}',
        '{"kind": "HeadClasses", "model": {"model_type": "x", "layers": 1, "heads": 1}, "structural": [[1]]}',
        '{"kind": "LayerRoles", "model": {"model_type": "x", "layers": 1, "heads": 1}, "drafters": [[0]]}',
    ],
)  # fmt: skip
def test_other_files_are_refused(text, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        HeadClasses.load(tmp_path / "a.json")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: HeadClasses(MODEL, ((), ())), lambda: HeadClasses(MODEL, ((), (), (4,))), lambda: HeadClasses(MODEL, 3),
        lambda: HeadClasses(MODEL, ((0, 0), (), ())), lambda: HeadClasses(MODEL, ((-1,), (), ())),
        lambda: HeadClasses(MODEL, ((True,), (), ())), lambda: LayerRoles(MODEL, ((3,),)),
        lambda: Identity("x", 0, 4), lambda: Identity("x", 2, True), lambda: Identity(None, 2, 4),
    ],
)  # fmt: skip
def test_groups_that_do_not_fit(make):
    with pytest.raises(ValueError) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_identity_of_a_config():
    grouped = SimpleNamespace(model_type="qwen2", num_hidden_layers=5, num_attention_heads=8, num_key_value_heads=2)
    assert Identity.of(grouped) == Identity("qwen2", 5, 2)
    plain = SimpleNamespace(model_type="var", num_hidden_layers=16, num_attention_heads=16)
    assert Identity.of(plain) == Identity("var", 16, 16)
