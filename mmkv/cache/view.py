"""`View`: what a layer hands to the attention function in place of keys and values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mmkv import compat
from mmkv.cache.deciding import attending, look
from mmkv.cache.fill import Asked
from mmkv.cache.mask import LazyMask
from mmkv.kernels import attend_dense, merge, prefill_sparse, without_gradient

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
        layer, positions = self.layer, self._positions(query)
        options = {"scale": asked.scale, "softcap": softcap, "merged": False}
        with torch.no_grad():
            parts = [
                segment.attend(query, q_positions=positions, window=layer.window, **options)
                for segment in layer.segments
                if not segment.empty
            ]
            parts.append(self._tail(query, positions, asked.causal, options))
            out, _ = merge(parts, sinks=s_aux, dtype=query.dtype)
        (out,) = without_gradient(query, out)
        return out.transpose(1, 2).contiguous()

    def _tail(self, query, positions, causal: bool, options: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over the dense tail, in parts that are yet to be merged."""
        sight = self._tail_sight(positions, causal)
        return attend_dense(query, self.layer.keys, self.layer.values, **sight, **options)

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

    def _positions(self, query: torch.Tensor) -> torch.Tensor:
        """Logical positions of the new tokens, int64 `[B, Tq]`; layers of one forward share them."""
        layer, key = self.layer, ("positions", self.layer.seen, self.new, query.device)
        if key not in layer.state.scratch:
            layer.state.scratch[key] = torch.arange(layer.seen - self.new, layer.seen, device=query.device)
        return layer.state.scratch[key].expand(query.shape[0], -1)

    def _tail_sight(self, positions: torch.Tensor, causal: bool) -> dict:
        """What `attend_dense` has to know of which query sees what of the dense tail."""
        layer = self.layer
        length = layer.keys.shape[2]
        key = (layer.start, length, tuple(layer.packed_to), layer.window, positions.device, causal)
        if key not in layer.state.scratch:
            layer.state.scratch[key] = self._make_tail_sight(positions, causal, length)
        return layer.state.scratch[key]

    def _make_tail_sight(self, positions: torch.Tensor, causal: bool, length: int) -> dict:
        layer = self.layer
        columns = torch.arange(layer.start, layer.start + length)
        held = layer.state.layout.valid[:, layer.start : layer.start + length]
        held = held & (columns >= torch.tensor(layer.packed_to)[:, None])
        causal = causal and self.new > 1
        window = layer.window if layer.window is not None and length > layer.window else None
        mask = None if bool(held.all()) else held[:, None, None].to(positions.device)
        if (
            positions.is_cuda
        ):  # a kernel compares positions as it goes, a mask of all pairs would be as large as the scores
            return {
                "mask": mask, "q_positions": positions, "k_start": layer.start, "causal": causal, "window": window
            }  # fmt: skip
        query, key = positions[:, None, :, None], columns[None, None, None, :]
        if causal:
            mask = key <= query if mask is None else mask & (key <= query)
        if window is not None:
            mask = key > query - window if mask is None else mask & (key > query - window)
        return {"mask": mask}


def attention(module, query, key, value, attention_mask, **kwargs):
    """The function registered as "mmkv": a view attends by itself, plain tensors go to the model's own attention."""
    name = module._mmkv_stock
    stock = compat.attention_function(name, module)
    if isinstance(key, View):
        return key.attend(stock, name, module, query, attention_mask, **kwargs)
    if isinstance(attention_mask, LazyMask):
        attention_mask = attention_mask.stock(name, None, None, key.device)
    return stock(module, query, key, value, attention_mask, **kwargs)
