"""The page's style sheet; colours come from Gradio's theme, so that light and dark both fit."""

CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
.watch .screen { aspect-ratio: 16 / 9; width: 100%; display: grid; place-items: center; border-radius: 8px;
  max-height: 340px;  background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary);
  color: var(--body-text-color-subdued); overflow: hidden; }
.watch .screen img { width: 100%; height: 100%; object-fit: contain; image-rendering: auto; margin: 0; }
.bar { height: 8px; margin: 10px 0 6px; border-radius: 4px; background: var(--border-color-primary); overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--color-accent); transition: width .3s; }
.bar.live i { width: 30%; animation: mmkv-live 1.6s infinite alternate ease-in-out; }
@keyframes mmkv-live { from { margin-left: 0; } to { margin-left: 70%; } }
@media (prefers-reduced-motion: reduce) { .bar.live i { animation: none; width: 100%; } }
.watch p, .gallery p { margin: 2px 0; overflow-wrap: anywhere; color: var(--body-text-color); }
.watch .facts, .gallery .facts { font-size: var(--text-sm); opacity: .75; }
.wrong { overflow-wrap: anywhere; margin-top: 6px; padding: 6px 10px; border-left: 3px solid var(--error-border-color, #dc2626);
  background: var(--error-background-fill); color: var(--error-text-color, #b91c1c); border-radius: 4px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 260px), 1fr)); gap: 20px; }
.chart { margin: 0; color: var(--body-text-color); }
.chart figcaption { font-size: var(--text-sm); margin-bottom: 4px; color: var(--body-text-color); }
.chart figcaption b { color: var(--body-text-color); }
.chart svg { display: block; width: 100%; height: 110px; background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary); border-radius: 6px; }
.chart .pace { fill: none; stroke: var(--color-accent); stroke-width: 2; vector-effect: non-scaling-stroke; }
.chart .axis { display: flex; justify-content: space-between; font-size: var(--text-xs);
  opacity: .75; }
.chart .legend { display: flex; flex-wrap: wrap; gap: 2px 12px; margin: 4px 0 0; font-size: var(--text-xs);
  color: var(--body-text-color); opacity: .75; }
.chart .legend i { display: inline-block; width: 9px; height: 9px; border-radius: 2px; margin-right: 4px; }
.gallery .frames { display: grid; grid-template-columns: repeat(auto-fill, minmax(88px, 1fr)); gap: 6px;
  max-height: 330px; overflow-y: auto; margin-top: 6px; }
.gallery figure { margin: 0; border: 2px solid transparent; border-radius: 6px; overflow: hidden;
  background: var(--background-fill-secondary); }
.gallery figure.best { border-color: var(--color-accent); }
.gallery figure img, .gallery figure .none { display: block; width: 100%; margin: 0; }
.gallery figure .none { aspect-ratio: 1; }
.gallery figcaption { font-size: 11px; text-align: center; padding: 1px 0 3px; color: var(--body-text-color);
  white-space: nowrap; }
.gallery figcaption b { color: var(--body-text-color); }
.gallery.empty { padding: 14px; text-align: center; border: 1px dashed var(--border-color-primary); border-radius: 8px; }
"""
