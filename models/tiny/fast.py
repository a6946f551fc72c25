"""A batched training forward on the parameters of the Hugging Face model (same logits, see `check_fast`).

The library loops over vision windows and pads questions with a block mask; here windows are a batch dimension, and one
video is shared by many independent questions: each question attends to the video prefix and to itself.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

HEADS, KV, DIM = 4, 2, 64  # query heads, KV heads, head channels of the language model
SECTION = (12, 10, 10)  # rotary frequencies that follow time, row, column
START = 3  # position of the first video token: after <|im_start|> user <|vision_start|>


def norm(x, weight, eps=1e-6):
    """RMS norm in float32."""
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def linear(x, weight, bias=None):
    """bfloat16 matrix product: five times the float32 speed of this CPU."""
    return F.linear(x.bfloat16(), weight.bfloat16(), None if bias is None else bias.bfloat16())


def rotate(x, cos, sin):
    """Rotary embedding, halves convention, float32 inside."""
    a, b = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat((-b, a), -1) * sin).to(x.dtype)


# ---- vision ----------------------------------------------------------------------------------------------------


def patches(frames: torch.Tensor) -> torch.Tensor:
    """float [N, 2, 64, 64, 3] in -1..1 -> [N, 64, 384], 2x2 merge blocks first, as the processor does."""
    n = frames.shape[0]
    x = frames.reshape(n, 2, 4, 2, 8, 4, 2, 8, 3)  # time, block row, row, y, block column, column, x, channel
    return x.permute(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(n, 64, 384)


def vision_angles(device=None):
    """cos and sin [64, 64] of the vision rotary embedding, in patch order."""
    grid = torch.arange(64).reshape(4, 2, 4, 2)
    order = grid.permute(0, 2, 1, 3).reshape(-1)
    row, col = order // 8, order % 8
    inverse = 1.0 / (10000.0 ** (torch.arange(0, 32, 2).float() / 32))
    angle = torch.cat((row[:, None] * inverse, col[:, None] * inverse), -1)
    angle = torch.cat((angle, angle), -1)
    return angle.cos().to(device), angle.sin().to(device)


def vision_block(x, cos, sin, windowed: bool, p):
    """One tower block on [N, 64, 128]; p: its parameters in `vision_weights` order."""
    n1, qkv_w, qkv_b, proj_w, proj_b, n2, gw, gb, uw, ub, dw, db = p
    n = x.shape[0]
    q, k, v = linear(norm(x, n1), qkv_w, qkv_b).view(n, 64, 3, 2, 64).unbind(2)
    q, k = (rotate(t, cos[:, None], sin[:, None]) for t in (q, k))
    if windowed:  # 4 x 4 patches: 2 x 2 merge blocks, which lie in a 4 x 4 grid

        def split(t):
            return t.view(n, 2, 2, 2, 2, 4, 2, 64).permute(0, 1, 3, 6, 2, 4, 5, 7).reshape(n * 4 * 2, 16, 64)

        q, k, v = split(q), split(k), split(v)
    else:
        q, k, v = (t.permute(0, 2, 1, 3).reshape(n * 2, 64, 64) for t in (q, k, v))
    weights = torch.softmax(torch.bmm(q, k.transpose(1, 2)).float() * 0.125, -1).to(v.dtype)
    out = torch.bmm(weights, v)
    if windowed:
        out = out.view(n, 2, 2, 2, 2, 2, 4, 64).permute(0, 1, 4, 2, 5, 6, 3, 7).reshape(n, 64, 128)
    else:
        out = out.view(n, 2, 64, 64).permute(0, 2, 1, 3).reshape(n, 64, 128)
    x = x + linear(out, proj_w, proj_b)
    y = norm(x, n2)
    return x + linear(F.silu(linear(y, gw, gb)) * linear(y, uw, ub), dw, db)


def vision_weights(block):
    """Parameters of one tower block."""
    a, m = block.attn, block.mlp
    return (
        block.norm1.weight, a.qkv.weight, a.qkv.bias, a.proj.weight, a.proj.bias, block.norm2.weight,
        m.gate_proj.weight, m.gate_proj.bias, m.up_proj.weight, m.up_proj.bias, m.down_proj.weight, m.down_proj.bias,
    )  # fmt: skip


def see(visual, frames, block=vision_block):
    """Tower on float [N, 2, 64, 64, 3] -> float32 [N, 16, 256], tokens in raster order."""
    cos, sin = vision_angles(frames.device)
    x = linear(patches(frames), visual.patch_embed.proj.weight.view(128, 384)).float()
    for i, layer in enumerate(visual.blocks):
        x = block(x, cos, sin, i == 0, vision_weights(layer))
    m = visual.merger
    x = norm(x, m.ln_q.weight).reshape(-1, 16, 512)
    return linear(F.gelu(linear(x, m.mlp[0].weight, m.mlp[0].bias)), m.mlp[2].weight, m.mlp[2].bias).float()


# ---- language --------------------------------------------------------------------------------------------------


def text_angles(positions):
    """cos and sin [..., 64] of positions [3, ...]: each frequency follows one of time, row, column."""
    inverse = 1.0 / (10000.0 ** (torch.arange(0, DIM, 2).float() / DIM))
    angles = positions[..., None].float() * inverse
    parts = angles.split(SECTION, -1)
    angle = torch.cat([part[i] for i, part in enumerate(parts)], -1)
    angle = torch.cat((angle, angle), -1)
    return angle.cos(), angle.sin()


def prefix_positions(steps: int, seconds, text_start):
    """[3, B, 3 + 16 * steps + 1] positions of prefix and video; seconds, text_start: [B] tensors."""
    batch = len(seconds)
    time = (torch.arange(steps).float()[None] * 2 * seconds[:, None]).long()[:, :, None].expand(-1, -1, 16)
    cell = torch.arange(16).expand(batch, steps, 16)
    video = torch.stack((time, cell // 4, cell % 4)).reshape(3, batch, steps * 16) + START
    head = torch.arange(START).expand(3, batch, START)
    return torch.cat((head, video, text_start.view(1, batch, 1).expand(3, batch, 1)), -1)


def split_heads(x, w, b, count):
    return linear(x, w, b).view(*x.shape[:-1], count, DIM)


def text_block(xv, xt, cv, sv, ct, st, p):
    """One decoder layer. xv [B, L, C] shared prefix, xt [B, N, Q, C] questions; cos and sin [B, L, D], [B, Q, D]."""
    n1, qw, qb, kw, kb, vw, vb, ow, n2, gw, uw, dw = p
    b, length, c = xv.shape
    n, size = xt.shape[1], xt.shape[2]
    group = HEADS // KV
    yv, yt = norm(xv, n1), norm(xt, n1)
    scale = DIM**-0.5
    qv = rotate(split_heads(yv, qw, qb, HEADS), cv[:, :, None], sv[:, :, None]) * scale
    kv_ = rotate(split_heads(yv, kw, kb, KV), cv[:, :, None], sv[:, :, None])
    vv = split_heads(yv, vw, vb, KV)
    ct_, st_ = ct[:, None, :, None], st[:, None, :, None]
    qt = rotate(split_heads(yt, qw, qb, HEADS), ct_, st_) * scale
    kt = rotate(split_heads(yt, kw, kb, KV), ct_, st_)
    vt = split_heads(yt, vw, vb, KV)

    kv_ = kv_.transpose(1, 2).reshape(b * KV, length, DIM)
    vv = vv.transpose(1, 2).reshape(b * KV, length, DIM)
    qv = qv.view(b, length, KV, group, DIM).permute(0, 2, 3, 1, 4).reshape(b * KV, group, length, DIM)
    outs, chunk = [], max(132, -(-length // 4))
    for i in range(0, length, chunk):  # causal: later keys are not even computed
        j = min(i + chunk, length)
        s = torch.bmm(qv[:, :, i:j].reshape(b * KV, group * (j - i), DIM), kv_[:, :j].transpose(1, 2))
        keep = torch.arange(j)[None] <= torch.arange(i, j)[:, None]
        s = s.view(b * KV, group, j - i, j).float().masked_fill(~keep, float("-inf"))
        e = torch.exp(s - s.amax(-1, keepdim=True).detach())
        z = e.sum(-1, keepdim=True)
        o = torch.bmm(e.bfloat16().view(b * KV, group * (j - i), j), vv[:, :j]).view(b * KV, group, j - i, DIM)
        outs.append(o / z)
    av = torch.cat(outs, 2).view(b, KV, group, length, DIM).permute(0, 3, 1, 2, 4).reshape(b, length, c)

    # [B, KV, N, group, Q, D]: rows of one KV head against the prefix, then against their own question
    qt = qt.view(b, n, size, KV, group, DIM).permute(0, 3, 1, 4, 2, 5)
    kt = kt.permute(0, 3, 1, 2, 4).reshape(b * KV * n, size, DIM)
    vt = vt.permute(0, 3, 1, 2, 4).reshape(b * KV * n, size, DIM)
    far = torch.bmm(qt.reshape(b * KV, n * group * size, DIM), kv_.transpose(1, 2)).float()
    near = torch.bmm(qt.reshape(b * KV * n, group * size, DIM), kt.transpose(1, 2)).float()
    keep = torch.ones(size, size, dtype=torch.bool).tril()
    near = near.view(-1, group, size, size).masked_fill(~keep, float("-inf")).view(b * KV, n * group * size, size)
    top = torch.maximum(far.amax(-1, keepdim=True), near.amax(-1, keepdim=True)).detach()
    ef, en = torch.exp(far - top), torch.exp(near - top)
    z = ef.sum(-1, keepdim=True) + en.sum(-1, keepdim=True)
    o = torch.bmm(ef.bfloat16(), vv).float()
    o = o + torch.bmm(en.bfloat16().view(b * KV * n, group * size, size), vt).view(o.shape).float()
    at = (o / z).view(b, KV, n, group, size, DIM).permute(0, 2, 4, 1, 3, 5).reshape(b, n, size, c)

    xv, xt = xv + linear(av, ow), xt + linear(at, ow)
    yv, yt = norm(xv, n2), norm(xt, n2)
    xv = xv + linear(F.silu(linear(yv, gw)) * linear(yv, uw), dw)
    xt = xt + linear(F.silu(linear(yt, gw)) * linear(yt, uw), dw)
    return xv, xt


def text_weights(layer):
    """Parameters of one decoder layer."""
    a, m = layer.self_attn, layer.mlp
    return (
        layer.input_layernorm.weight, a.q_proj.weight, a.q_proj.bias, a.k_proj.weight, a.k_proj.bias, a.v_proj.weight,
        a.v_proj.bias, a.o_proj.weight, layer.post_attention_layernorm.weight, m.gate_proj.weight, m.up_proj.weight,
        m.down_proj.weight,
    )  # fmt: skip


def read(language, head_ids, features, questions, positions, text_positions, block=text_block):
    """Hidden states [B, N, Q, C] of questions: the last, normed, and those after layer 4.

    head_ids: the three prefix ids and vision_end; features [B, V, C]; questions ids [B, N, Q]; positions [3, B, L] of
    the prefix; text_positions [3, B, Q].
    """
    table = language.embed_tokens.weight
    head = table[head_ids].expand(features.shape[0], -1, -1)
    xv = torch.cat((head[:, :START], features.float(), head[:, START:]), 1)
    xt = table[questions]
    (cv, sv), (ct, st) = text_angles(positions), text_angles(text_positions)
    middle = None
    for i, layer in enumerate(language.layers):
        xv, xt = block(xv, xt, cv, sv, ct, st, text_weights(layer))
        middle = xt if i == 3 else middle
    return norm(xt, language.norm.weight), middle
