"""Restate the model, its loss and AdamW in plain fp64 torch, one process, nothing shared with us.

Written from the papers (Llama 2, RoFormer, AdamW), with loops where loops are clearer. Weights come
in under their global names; layouts of fused matrices follow
megatron-core: QKV rows are [group, (H/G query heads, key, value), K], gate rows precede up rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rms_norm(x, weight, epsilon):
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon) * weight


def rotate(x_TK: Tensor, position_T: Tensor, base: float) -> Tensor:
    """Rotate pair (i, i + K/2) of each position by position * base^(-2i/K)."""
    half = x_TK.shape[-1] // 2
    out = torch.empty_like(x_TK)
    for i in range(half):
        angle = position_T.double() * base ** (-2.0 * i / (2 * half))
        a, b = x_TK[..., i], x_TK[..., i + half]
        out[..., i] = a * torch.cos(angle) - b * torch.sin(angle)
        out[..., i + half] = b * torch.cos(angle) + a * torch.sin(angle)
    return out


def attention(x_TD, weights, prefix, model, position_T):
    H, G = model.attention_heads, model.kv_heads
    K = model.hidden_size // H
    T = x_TD.shape[0]
    rows = weights[f"{prefix}.self_attention.linear_qkv.weight"].view(G, H // G + 2, K, -1)
    outputs = []
    for g in range(G):
        key = rotate(x_TD @ rows[g, H // G].t(), position_T, model.rope_base)
        value = x_TD @ rows[g, H // G + 1].t()
        for h in range(H // G):
            query = rotate(x_TD @ rows[g, h].t(), position_T, model.rope_base)
            scores = query @ key.t() / math.sqrt(K)
            allowed = torch.zeros(T, T, dtype=torch.bool)
            start = 0
            for t in range(T):
                start = t if position_T[t] == 0 else start
                allowed[t, start : t + 1] = True
            outputs.append(torch.softmax(scores.masked_fill(~allowed, -math.inf), -1) @ value)
    return torch.cat(outputs, -1) @ weights[f"{prefix}.self_attention.linear_proj.weight"].t()


def mlp(x_TD, weights, prefix):
    gate_up = x_TD @ weights[f"{prefix}.mlp.linear_fc1.weight"].t()
    gate, up = gate_up.chunk(2, -1)
    return (gate * torch.sigmoid(gate) * up) @ weights[f"{prefix}.mlp.linear_fc2.weight"].t()


def hidden_states(weights, model, input_T, position_T):
    x = weights["embedding.word.weight"][input_T]
    for layer in range(model.layers):
        prefix = f"layers.{layer}.layer"
        norm = rms_norm(x, weights[f"{prefix}.input_layernorm.weight"], model.norm_epsilon)
        x = x + attention(norm, weights, prefix, model, position_T)
        norm = rms_norm(x, weights[f"{prefix}.pre_mlp_layernorm.weight"], model.norm_epsilon)
        x = x + mlp(norm, weights, prefix)
    return rms_norm(x, weights["mode_head.norm.weight"], model.norm_epsilon)


def batch_loss(weights, config, vocab_tokens, rows) -> Tensor:
    """Return sum(a*nll)/A + lambda*sum(c*bce)/C over all rows of the global batch."""
    head = weights.get("lm_head.linear.weight", weights["embedding.word.weight"])
    lm_sum = mode_sum = torch.zeros((), dtype=torch.float64)
    for input_T, target_T, a_T, m_T, c_T, position_T in rows:
        hidden = hidden_states(weights, config.model, input_T, position_T)
        logits = hidden @ head[:vocab_tokens].t()
        nll = torch.logsumexp(logits, -1) - logits.gather(-1, target_T[:, None])[:, 0]
        z = hidden @ weights["mode_head.mode_weight"] + weights["mode_head.mode_bias"][0]
        p = torch.sigmoid(z)
        bce = -(m_T * torch.log(p) + (1 - m_T) * torch.log(1 - p))
        lm_sum = lm_sum + (a_T * nll).sum()
        mode_sum = mode_sum + (c_T * bce).sum()
    total_a = sum(row[2].sum() for row in rows)
    total_c = sum(row[4].sum() for row in rows)
    return lm_sum / total_a + config.loss.mode_weight * mode_sum / total_c


def decays(name: str) -> bool:
    return not name.endswith(("norm.weight", "mode_bias"))


def train(weights, config, vocab_tokens, batches):
    """Run AdamW with clipping over the batches; return [(loss, grad norm, gradients)]."""
    optimizer = config.optimizer
    moments = {n: (torch.zeros_like(w), torch.zeros_like(w)) for n, w in weights.items()}
    history = []
    for step, rows in enumerate(batches, start=1):
        leaves = {n: w.detach().requires_grad_() for n, w in weights.items()}
        loss = batch_loss(leaves, config, vocab_tokens, rows)
        loss.backward()
        grads = {n: leaf.grad for n, leaf in leaves.items()}
        norm = math.sqrt(sum(float((g * g).sum()) for g in grads.values()))
        history.append((float(loss), norm, grads))
        clip = optimizer.clip_grad_norm
        scale = clip / norm if clip and norm > clip else 1.0
        new = {}
        for name, weight in weights.items():
            grad = grads[name] * scale
            first, second = moments[name]
            first = optimizer.beta1 * first + (1 - optimizer.beta1) * grad
            second = optimizer.beta2 * second + (1 - optimizer.beta2) * grad * grad
            moments[name] = (first, second)
            rate = optimizer.learning_rate
            decay = optimizer.weight_decay if decays(name) else 0.0
            mean = first / (1 - optimizer.beta1**step)
            root = torch.sqrt(second / (1 - optimizer.beta2**step)) + optimizer.epsilon
            new[name] = weight * (1 - rate * decay) - rate * mean / root
        weights = new
    return history
