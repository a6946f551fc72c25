"""`View`: what a layer hands to the attention function in place of keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mmkv import compat
from mmkv.cache.deciding import attending, look
from mmkv.cache.fill import Asked
from mmkv.cache.mask import LazyMask
from mmkv.kernels import attend_dense, merge, merge_sinks, prefill_sparse

if TYPE_CHECKING:
    from mmkv.cache.layer import KVLayer

# keywords of an attention call that say nothing about which key a query may see
_HARMLESS = {
    "position_ids", "cache_position", "use_cache", "past_key_values", "output_router_logits", "position_embeddings",
    "output_hidden_states", "return_dict", "mm_token_type_ids", "logits_to_keep", "training", "num_items_in_batch",
}  # fmt: skip


class View:
    """Attends to one layer's tokens on behalf of one forward. Lives as long as the attention call.

    Args:
        layer: the layer, new tokens already appended.
        new: number of new tokens, which are the queries.
    """

    def __init__(self, layer: KVLayer, new: int):
        self.layer, self.new = layer, new

    def attend(self, stock, stock_name: str, module, query: torch.Tensor, mask, **kwargs):
        """Attention of the new tokens `[B, Hq, T, D]` over everything the layer holds.

        Args:
            stock: the model's own attention function, used unchanged while everything is dense.
            stock_name: its name in transformers' registry.
            mask: what the registered mask function returned, a 4-D mask of the user's, or None.
            kwargs: as transformers passes them.

        Returns:
            output `[B, T, Hq, D]` and None (or the weights, where the stock function returns them).
        """
        layer, scaling = self.layer, kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        asked = Asked(query.detach(), scale, kwargs.get("softcap"), kwargs.get("is_causal") is not False)
        dense = not layer.segments and max(layer.packed_to) <= layer.start  # all that was seen is in the tail
        chosen = attending(layer, asked) if dense else None
        if chosen is not None:
            result = self._sparse(query, mask, chosen, asked, **kwargs), None
        elif dense:
            result = self._dense(stock, stock_name, module, query, mask, kwargs)
        else:
            result = self._merged(query, mask, asked, **kwargs), None
        look(layer, asked)
        layer.settle(asked)
        return result

    def _dense(self, stock, stock_name, module, query, mask, kwargs):
        layer = self.layer
        keys, values, start = layer.keys, layer.values, layer.start
        if layer.window is not None and layer.state.record_past:
            # hand over what a stock sliding layer would, so that results are the same to the bit
            visible = layer.window - 1 + self.new
            start += max(keys.shape[2] - visible, 0)
            keys, values = keys[:, :, -visible:], values[:, :, -visible:]
        if isinstance(mask, LazyMask):
            mask = mask.stock(stock_name, keys.shape[2], start, keys.device)
        return stock(module, query, keys, values, mask, **kwargs)

    def _sparse(self, query, mask, chosen, asked, *, scaling=None, dropout=0.0, softcap=None, s_aux=None,
                sliding_window=None, is_causal=None, **other):  # fmt: skip
        """Causal attention among the chosen tokens of each batch element; the others get no output in this layer."""
        self._refuse(mask, dropout, other)
        layer = self.layer
        out = [
            prefill_sparse(
                query[row], layer.keys[row], layer.values[row], (columns - layer.start).to(query.device),
                scale=asked.scale, softcap=softcap, sinks=s_aux,
            )
            for row, columns in enumerate(chosen)
        ]  # fmt: skip
        return torch.stack(out).transpose(1, 2).contiguous()

    def _merged(self, query, mask, asked, *, scaling=None, dropout=0.0, softcap=None, s_aux=None,
                sliding_window=None, is_causal=None, **other):  # fmt: skip
        self._refuse(mask, dropout, other)
        layer, scale = self.layer, asked.scale
        batch, _, new, _ = query.shape
        positions = torch.arange(layer.seen - new, layer.seen, device=query.device).expand(batch, -1)
        parts = [
            segment.attend(query, scale=scale, softcap=softcap, q_positions=positions, window=layer.window)
            for segment in layer.segments
            if not segment.empty
        ]
        seen = self._tail_mask(positions, asked.causal)
        tail = attend_dense(query, layer.keys, layer.values, scale=scale, mask=seen, softcap=softcap)
        out, lse = merge(parts + [tail])
        if s_aux is not None:
            out, lse = merge_sinks(out, lse, s_aux)
        return out.to(query.dtype).transpose(1, 2).contiguous()

    def _refuse(self, mask, dropout, other) -> None:
        if isinstance(mask, torch.Tensor):
            raise ValueError("a 4-D attention mask does not work with a compressed cache; pass the 2-D padding mask")
        if isinstance(mask, LazyMask) and not mask.plain:
            raise ValueError(
                "this attention mask (bidirectional or packed blocks) does not work with a compressed cache"
            )
        if dropout:
            raise ValueError(f"attention dropout {dropout} does not work with a compressed cache; call model.eval()")
        unknown = [
            name for name, value in other.items() if value is not None and value is not False and name not in _HARMLESS
        ]
        if unknown:
            raise ValueError(f"attention keyword {', '.join(unknown)} is not supported with a compressed cache")

    def _tail_mask(self, positions: torch.Tensor, causal: bool) -> torch.Tensor | None:
        """bool `[B, 1, Tq, T]` over the dense tail, None where every query sees all of it."""
        layer = self.layer
        key = (layer.start, layer.keys.shape[2], tuple(layer.packed_to), layer.window, positions.device, causal)
        if key not in layer.state.scratch:
            layer.state.scratch[key] = self._make_tail_mask(positions, causal)
        return layer.state.scratch[key]

    def _make_tail_mask(self, positions: torch.Tensor, causal: bool) -> torch.Tensor | None:
        layer = self.layer
        length = layer.keys.shape[2]
        columns = torch.arange(layer.start, layer.start + length)
        held = layer.state.layout.valid[:, layer.start : layer.start + length]
        held = held & (columns >= torch.tensor(layer.packed_to)[:, None])
        plain = bool(held.all())
        windowed = layer.window is not None and length > layer.window
        if plain and (self.new == 1 or not causal) and not windowed:
            return None
        columns, held = columns.to(positions.device), held.to(positions.device)
        query, key = positions[:, None, :, None], columns[None, None, None, :]
        mask = held[:, None, None, :].expand(-1, -1, query.shape[2], -1)
        if causal:
            mask = mask & (key <= query)
        if layer.window is not None:
            mask = mask & (key > query - layer.window)
        return mask


def attention(module, query, key, value, attention_mask, **kwargs):
    """The function registered as "mmkv": a view attends by itself, plain tensors go to the model's own attention."""
    name = module._mmkv_stock
    stock = compat.attention_function(name, module)
    if isinstance(key, View):
        return key.attend(stock, name, module, query, attention_mask, **kwargs)
    if isinstance(attention_mask, LazyMask):
        attention_mask = attention_mask.stock(name, None, None, key.device)
    return stock(module, query, key, value, attention_mask, **kwargs)
