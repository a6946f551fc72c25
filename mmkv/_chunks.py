"""`Pieces`: a long prompt read by the decoder a chunk at a time, its cache compressed in between."""

from __future__ import annotations

import torch

from mmkv.layout import TokenLayout

LEAST = 64  # a chunk has to be longer than the newest tokens, which no method touches


class Pieces:
    """One forward of the decoder, cut along the tokens. All chunks but the last run here; the last is left to the caller.

    Args:
        module: the decoder.
        kwargs: what its forward was called with, embeddings of images and videos in place.
        layout: of the new tokens.
        size: tokens of a chunk.
        inputs: keywords of the whole model's forward.
        state: of the cache.

    Raises:
        ValueError: hidden states of all layers were asked for, or a mask is no 2-D padding mask.
    """

    def __init__(self, module, kwargs: dict, layout: TokenLayout, size: int, inputs: dict, state):
        if kwargs.get("output_hidden_states") or inputs.get("output_hidden_states"):
            raise ValueError("output_hidden_states does not work with prefill_chunk; leave one of them out")
        mask = kwargs.get("attention_mask")
        if mask is not None and (not isinstance(mask, torch.Tensor) or mask.dim() != 2):
            raise ValueError("prefill_chunk takes the 2-D padding mask; another attention_mask was given")
        self.module, self.kwargs, self.layout, self.state = module, kwargs, layout, state
        length = len(layout)
        step = -(-length // -(-length // size))  # chunks of one length, so that the last is no scrap
        self.spans = [slice(i, min(i + step, length)) for i in range(0, length, step)]
        last = self.spans[-1].stop - self.spans[-1].start
        wanted = inputs.get("logits_to_keep", 0)
        # nobody reads the hidden states of the tokens before
        self._skips = isinstance(wanted, int) and 0 < wanted <= last
        self._hidden: list[torch.Tensor] = []
        self.at = 0  # first token of the chunk that runs

    def run(self, embeds: torch.Tensor | None) -> dict:
        """Run all chunks but the last, and enter the last into the state; returns the keywords to run it with."""
        self.state.chunk_of, self.state.chunk_base = self.layout, self.state.seen
        for span in self.spans:
            self.state.more = span is not self.spans[-1]
            self.at = span.start
            self.state.extend(self.layout.take(span), None if embeds is None else embeds[:, span])
            if self.state.more:
                self.module(**self._cut(span))
        return self._cut(self.spans[-1])

    def joined(self, output):
        """The decoder's output with the hidden states of all chunks; called after each of them."""
        self._hidden.append(output.last_hidden_state)
        if len(self._hidden) == len(self.spans) and not self._skips:
            output.last_hidden_state = torch.cat(self._hidden, 1)
        if self._skips:
            self._hidden = [None] * len(self._hidden)
        return output

    def _cut(self, span: slice) -> dict:
        """The keywords for a chunk."""
        batch, length = self.layout.batch, len(self.layout)
        out = dict(self.kwargs)
        mask = out.get("attention_mask")
        if mask is not None:
            out["attention_mask"] = mask[:, : mask.shape[1] - length + span.stop]
        if out.get("position_ids") is not None:
            out["position_ids"] = out["position_ids"][..., span]
        if out.get("cache_position") is not None:
            out["cache_position"] = out["cache_position"][span]
        visual = out.get("visual_pos_masks")
        for name, value in self.kwargs.items():
            if name in ("attention_mask", "position_ids", "cache_position") or not isinstance(value, torch.Tensor):
                continue
            if value.shape[:2] == (batch, length):  # tokens: ids, embeddings, types
                out[name] = value[:, span]
        if visual is not None and out.get("deepstack_visual_embeds") is not None:
            mask = visual if visual.dim() == 2 else visual[..., 0]
            inside = torch.zeros_like(mask)
            inside[:, span] = True
            mine = inside[mask]  # of the visual tokens, in the order of their features
            out["deepstack_visual_embeds"] = [features[mine] for features in self.kwargs["deepstack_visual_embeds"]]
            if not bool(mine.any()):  # a chunk of text
                out["deepstack_visual_embeds"], out["visual_pos_masks"] = None, None
        return out


def check_chunk(size) -> None:
    """Raise ValueError for an impossible `prefill_chunk`."""
    if size is None:
        return
    if isinstance(size, bool) or not isinstance(size, int) or size < LEAST:
        raise ValueError(f"prefill_chunk {size!r}: possible are whole numbers of tokens from {LEAST}, or None")
