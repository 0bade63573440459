"""Where nano-qwq starts: attention that sees recent tokens and that copies, instead of noise.

Copying is what small transformers learn last, and most of a thought is copying with a change now
and then. So the first layer's heads begin by looking 1, 2, 3, 4 tokens back and writing what they
saw into subspaces of their own, and the next layer's begin as induction heads that match those.
Source: C. Olsson et al. 2022, "In-context Learning and Induction Heads".
"""

from __future__ import annotations

import math
from typing import Any

import torch

RECENT_BIAS, N_RECENT_PAIRS = 4.0, 6  # how sharply heads begin by looking at recent tokens
N_MATCHED_PAIRS = 11  # of rope's pairs, the slow ones: what they match hardly depends on distance
MATCH, COPY = 1.2, 0.3  # strength of a match in q and k, and of a copied token in the logits
EMBEDDING_SCALE = 0.7


def look_at_recent_tokens(model: Any) -> None:
    """Start the query heads of each layer's first key head at the tokens 1, 2, 3, 4 before.

    Biases of q and k that rope turns apart by so many positions do that.
    """
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    n_pairs = head_dim // 2
    frequencies = model.model.rotary_emb.inv_freq
    strengths = torch.where(torch.arange(n_pairs) < N_RECENT_PAIRS, RECENT_BIAS, 0.0)
    with torch.no_grad():
        for layer in model.model.layers:
            phases = torch.rand(n_pairs) * 2 * math.pi
            attention = layer.self_attn
            attention.k_proj.bias[:head_dim] = _pairs(strengths, phases)
            for head in range(config.num_attention_heads // config.num_key_value_heads):
                turned = phases - (head + 1) * frequencies
                attention.q_proj.bias[_rows(head, head_dim)] = _pairs(strengths, turned)


def copy_after_a_match(model: Any) -> None:
    """Start the second layer's other key head as induction heads over the first layer's output.

    Its keys hold the two tokens before; its queries look for the present and the previous token
    (copying a number), or for the tokens 1 and 3 before (copying every other token).
    """
    config = model.config
    hidden, d = config.hidden_size, config.hidden_size // config.num_attention_heads
    basis = torch.linalg.qr(torch.randn(hidden, hidden))[0].T.split(d)  # of orthonormal rows
    token, back, copied = basis[0], basis[1:5], basis[5]
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
    with torch.no_grad():
        seen = torch.cat(back)
        embedding.normal_(std=EMBEDDING_SCALE)
        embedding -= embedding @ seen.T @ seen
        first.k_proj.weight[:d] *= 0.1
        first.q_proj.weight[: 4 * d] *= 0.1
        first.v_proj.weight[:d] = token
        for distance, subspace in enumerate(back):
            first.o_proj.weight[:, _rows(distance, d)] = subspace.T
        slow = [*range(d // 2 - N_MATCHED_PAIRS, d // 2), *range(d - N_MATCHED_PAIRS, d)]
        half = N_MATCHED_PAIRS
        second.k_proj.weight[d:].zero_()
        second.k_proj.weight[d:][slow[:half]] = MATCH * back[0][:half]
        second.k_proj.weight[d:][slow[half:]] = MATCH * back[1][:half]
        wanted = ((token, back[0]), (back[0], back[2]))
        for index, (one, other) in enumerate(wanted * 2):
            query = second.q_proj.weight[_rows(4 + index, d)]
            query.zero_()
            query[slow[:half]] = MATCH * one[:half]
            query[slow[half:]] = MATCH * other[:half]
        second.v_proj.weight[d:] = token
        second.o_proj.weight[:, _rows(4, d)] = copied.T
        second.o_proj.weight[:, _rows(5, d)] = copied.T
        head += COPY * embedding @ token.T @ copied


def _rows(head: int, head_dim: int) -> slice:
    return slice(head * head_dim, (head + 1) * head_dim)


def _pairs(strengths: torch.Tensor, phases: torch.Tensor) -> torch.Tensor:
    """Pairs of these lengths and angles, as rope lays them out: first halves, then second."""
    return torch.cat([strengths * phases.cos(), strengths * phases.sin()])
