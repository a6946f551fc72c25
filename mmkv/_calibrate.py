"""What `mmkv calibrate` does: which heads of a painting model are structural and which of its layers draft, measured once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmkv.parts.calibration import HeadClasses, LayerRoles

DRAFTING = 0.06  # share of the (layer, scale) pairs that draft; ScaleKV's published tables: 9 of 160 and 15 of 200


@dataclass(frozen=True)
class Calibrated:
    """What was measured.

    Args:
        heads: for HACK.
        roles: for ScaleKV.
        agreement: share of the heads whose class the first image alone gives as well.
    """

    heads: HeadClasses
    roles: LayerRoles
    agreement: float


def read_prompts(path: str) -> list[str]:
    """The prompts of a text file, one a line.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or nothing in it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--prompts {path}: no such file; give one with a prompt on each line")
    prompts = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts {path} is empty; give a prompt on each line")
    return prompts


def calibrate(
    model: Any,
    prompts: list[str],
    contextual: float = 0.5,
    drafters: int | None = None,
    share: float = 0.1,
    tick: Callable[[], None] = lambda: None,
    **options: Any,
) -> Calibrated:
    """Paint each prompt with the whole cache, and look at where the heads look.

    Args:
        model: an Infinity with a text encoder; it is left as it was found.
        prompts: what to paint; 10 are enough for ScaleKV, HACK took 50.
        contextual: share of all heads that become contextual.
        drafters: (layer, scale) pairs that draft; 6 % of all where None.
        share: what ScaleKV is to keep on average; pairs before it drops anything do not count.
        tick: called after each image.
        options: as the model's `generate` takes them.

    Raises:
        ValueError: the model makes no images scale by scale, or a number that is not possible.
    """
    import mmkv
    from mmkv.cache import ScaleStatistics
    from mmkv.parts.calibration import Identity

    if isinstance(share, bool) or not 0 < share <= 1:
        raise ValueError(f"share {share}: possible are numbers above 0 to 1, what ScaleKV is to keep on average")
    statistics, identity, classes = ScaleStatistics(), Identity.of(model.config), []
    options = {"seed": 0, **options}
    with mmkv.wrapped(model, cache=[statistics]):
        for prompt in prompts:
            model.generate(model.text_encoder([prompt]), **options)
            classes.append(statistics.head_classes(contextual, identity))
            tick()
    sizes = model.schedule(**{name: options[name] for name in ("ratio", "pixels") if name in options}).tokens
    before = [sum(sizes[:scale]) for scale in range(len(sizes))]
    cut = next((scale for scale, count in enumerate(before) if count > share * before[-1]), len(sizes) - 1)
    pairs = max(1, round(DRAFTING * identity.layers * (len(sizes) - cut))) if drafters is None else drafters
    roles = statistics.layer_roles(pairs, identity, first=cut)
    return Calibrated(classes[-1], roles, agreement(classes[0], classes[-1]))


def agreement(one: HeadClasses, other: HeadClasses) -> float:
    """Share of the heads that two calibrations put into the same class."""
    differing = sum(len(set(a) ^ set(b)) for a, b in zip(one.structural, other.structural))
    return 1 - differing / (one.model.layers * one.model.heads)


def targets(model: Any, heads: str | None, roles: str | None) -> tuple[Path, Path]:
    """Where the results go: as told, else in the model's folder, where `mmkv.wrap` finds them.

    Raises:
        ValueError: there is no such folder.
    """
    from mmkv.parts.calibration import HeadClasses, LayerRoles

    home = Path(getattr(model, "name_or_path", "") or ".")
    home = home if home.is_dir() else Path(".")
    found = Path(heads or home / HeadClasses.file), Path(roles or home / LayerRoles.file)
    for path in found:
        if not path.absolute().parent.is_dir():
            raise ValueError(f"{path}: no such folder; make it first")
    return found
