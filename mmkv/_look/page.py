"""The page: one HTML file with every picture in it, and sliders over frames and stages."""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mmkv._look.paint import LEGEND, paint
from mmkv._look.stages import Stage
from mmkv._look.strip import Scene, chosen, plain

PIXELS = 480  # of a picture's width
MOST = 32  # frames in a page


def page(scene: Scene, stages: Sequence[Stage]) -> str:
    """The page's source; of more than 32 frames evenly chosen ones."""
    frames = chosen(len(scene.images), MOST)
    caption = scene.caption
    if len(frames) < len(scene.images):
        caption += f"; {len(frames)} of {len(scene.images)} frames"
    data = {
        "labels": [scene.labels[f] for f in frames],
        "stages": [
            {
                "name": "input",
                "note": "",
                "pictures": [_data(plain(scene.images[f], stages, f, PIXELS)) for f in frames],
            },
            *(
                {
                    "name": f"{stage.method}, {stage.place}",
                    "note": stage.counts,
                    "pictures": [_data(paint(scene.images[f], stage.group[f], stage.lead[f], PIXELS)) for f in frames],
                }
                for stage in stages
            ),
        ],
    }
    legend = "".join(
        f'<li><span style="background:{_css(fill)};border:{thick}px solid {_css(rim)}"></span>{html.escape(word)}</li>'
        for word, fill, rim, thick in LEGEND
    )
    out = PAGE.replace("@title", html.escape(scene.title)).replace("@caption", html.escape(caption))
    return out.replace("@legend", legend).replace("@data", json.dumps(data).replace("<", "\\u003c"))


def _data(image: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=85, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _css(rgb: tuple[int, ...]) -> str:
    return f"rgb({','.join(map(str, rgb))})"


PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>@title</title>
<style>
:root { color-scheme: light dark; --paper: #fff; --ink: #18181b; --pale: #5c5c66; --rule: #d4d4d8; --mark: #2563eb; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #18181b; --ink: #f4f4f5; --pale: #a9a9b3; --rule: #3f3f46; --mark: #7aa2ff; }
}
body { margin: 0 auto; padding: 24px; max-width: 1080px; background: var(--paper); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.3rem; margin: 0; overflow-wrap: anywhere; }
p { margin: 4px 0 12px; color: var(--pale); overflow-wrap: anywhere; }
ul { display: flex; flex-wrap: wrap; gap: 6px 20px; margin: 0 0 16px; padding: 0; list-style: none; font-size: .9rem; }
li { display: flex; align-items: center; gap: 8px; }
li span { width: 14px; height: 14px; box-sizing: border-box; outline: 1px solid var(--rule); }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(280px, 100%), 1fr)); gap: 16px; align-items: start; }
figure { margin: 0; }
figcaption { min-height: 3em; }
figcaption b { display: block; }
figcaption span { color: var(--pale); font-size: .9rem; }
img { display: block; width: 100%; height: auto; }
.bar { display: grid; grid-template-columns: 4rem 1fr minmax(9rem, auto); gap: 12px; align-items: center; margin: 12px 0; }
.bar input { width: 100%; accent-color: var(--mark); }
.bar output { color: var(--pale); font-variant-numeric: tabular-nums; }
#all { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px; margin-top: 20px; }
#all button { padding: 6px; border: 2px solid var(--rule); border-radius: 6px; background: none; color: inherit;
  font: inherit; font-size: .85rem; text-align: left; cursor: pointer;
  display: flex; flex-direction: column; justify-content: space-between; }
#all button[aria-pressed=true] { border-color: var(--mark); }
#all img { margin-top: 6px; }
</style>
<h1>@title</h1>
<p>@caption</p>
<ul>@legend</ul>
<label class="bar">Frame <input id="frame" type="range" min="0" value="0"><output id="when"></output></label>
<label class="bar">Stage <input id="stage" type="range" min="0" value="1"><output id="where"></output></label>
<div class="pair">
<figure><figcaption><b>input</b></figcaption><img id="left" alt="the frame as it is"></figure>
<figure><figcaption><b id="name"></b><span id="note"></span></figcaption><img id="right" alt="its tokens at this stage"></figure>
</div>
<div id="all"></div>
<script id="data" type="application/json">@data</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const [frame, stage, when, where, left, right, title, note, all] =
  ["frame", "stage", "when", "where", "left", "right", "name", "note", "all"].map((id) => document.getElementById(id));
frame.max = data.labels.length - 1;
stage.max = data.stages.length - 1;
frame.value = Math.floor(data.labels.length / 2);
stage.value = data.stages.length - 1;
frame.closest("label").hidden = data.labels.length < 2;
const buttons = data.stages.map((one, i) => {
  const button = document.createElement("button");
  button.append(one.name, document.createElement("img"));
  button.lastChild.alt = "";
  button.onclick = () => { stage.value = i; show(); };
  all.append(button);
  return button;
});
function show() {
  const f = Number(frame.value), s = Number(stage.value), one = data.stages[s];
  when.textContent = data.labels[f] + " (" + (f + 1) + " of " + data.labels.length + ")";
  where.textContent = s + " of " + (data.stages.length - 1);
  left.src = data.stages[0].pictures[f];
  right.src = one.pictures[f];
  title.textContent = one.name;
  note.textContent = one.note;
  buttons.forEach((button, i) => {
    button.lastChild.src = data.stages[i].pictures[f];
    button.setAttribute("aria-pressed", i === s);
  });
}
frame.oninput = stage.oninput = show;
show();
</script>
</html>
"""
