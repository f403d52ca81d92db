"""What every operator means, as plain loops over tokens and slots in float64 on the CPU.

Nothing here groups, gathers or batches: one slot is one matrix-vector product, taken straight from the definition.
Gradients come from autograd over these loops, so a wrong gradient formula in the library has nothing in common with them.
"""

import math

import torch
from torch import Tensor

GATED = ("swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_clamped")
PLAIN = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity")
ACTIVATIONS = GATED + PLAIN
# A derivative that jumps: rounding a pre-activation across the jump changes a gradient by all of it.
KINKED = ("reglu", "swiglu_clamped", "relu", "relu2")
GLU_LAYOUTS = ("gate_up", "up_gate", "interleaved")


def leaf(tensor: Tensor | None) -> Tensor | None:
    """A float64 CPU copy of `tensor` (exact for every supported dtype) that gradients are taken of."""
    return None if tensor is None else tensor.detach().to("cpu", torch.float64).clone().requires_grad_()


def gradients(
    outputs: Tensor | tuple[Tensor, ...], inputs: list[Tensor], grads: Tensor | tuple[Tensor, ...]
) -> list[Tensor]:
    """d(outputs)/d(inputs) applied to `grads`, with zeros where an input plays no part."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grads = grads if isinstance(grads, tuple) else (grads,)
    pairs = [(o, g.detach().to("cpu", torch.float64)) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
    if not pairs:
        return [torch.zeros_like(i) for i in inputs]
    found = torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True)
    return [torch.zeros_like(i) if g is None else g.detach() for i, g in zip(inputs, found, strict=True)]


def group(expert_ids: Tensor, num_experts: int) -> tuple[list[int], list[int], list[int]]:
    """slot_order, slot_position (of every slot, sentinels too) and expert_offsets, by putting slots into buckets."""
    buckets: list[list[int]] = [[] for _ in range(num_experts)]
    sentinels: list[int] = []
    for slot, expert in enumerate(expert_ids.reshape(-1).tolist()):
        (buckets[expert] if 0 <= expert < num_experts else sentinels).append(slot)
    order: list[int] = []
    offsets = [0]
    for bucket in buckets:
        order += bucket
        offsets.append(len(order))
    order += sentinels
    position = [0] * len(order)
    for place, slot in enumerate(order):
        position[slot] = place
    return order, position, offsets


def slot_experts(expert_ids: Tensor, num_experts: int) -> list[int | None]:
    """The expert of each slot; None for a sentinel."""
    return [e if 0 <= e < num_experts else None for e in expert_ids.reshape(-1).tolist()]


def parallel_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, expert_ids: Tensor, rows: str = "token", grouped_out: bool = False
) -> Tensor:
    """y[slot] = weight[expert(slot)] @ x[row of slot] + bias[expert(slot)]; rows are by "token", "slot" or "grouped"."""
    top_k = 1 if expert_ids.dim() == 1 else expert_ids.size(1)
    _, position, _ = group(expert_ids, weight.size(0))
    x_rows, matrices = x.unbind(0), weight.unbind(0)
    biases = None if bias is None else bias.unbind(0)
    out = [x.new_zeros(weight.size(1)) for _ in position]
    for slot, expert in enumerate(slot_experts(expert_ids, weight.size(0))):
        if expert is None:
            continue
        row = {"token": slot // top_k, "slot": slot, "grouped": position[slot]}[rows]
        y = matrices[expert] @ x_rows[row]
        if biases is not None:
            y = y + biases[expert]
        out[position[slot] if grouped_out else slot] = y
    return torch.stack(out) if out else x.new_zeros(0, weight.size(1))


def combine(rows: Tensor, gates: Tensor | None, expert_ids: Tensor, num_experts: int, grouped: bool = True) -> Tensor:
    """y[token] = sum over its slots of gate * row."""
    expert_ids = expert_ids.unsqueeze(1) if expert_ids.dim() == 1 else expert_ids
    tokens, top_k = expert_ids.shape
    _, position, _ = group(expert_ids, num_experts)
    experts = slot_experts(expert_ids, num_experts)
    all_rows = rows.unbind(0)
    out = []
    for token in range(tokens):
        y = rows.new_zeros(rows.size(1))
        for j in range(top_k):
            slot = token * top_k + j
            if experts[slot] is None:
                continue
            row = all_rows[position[slot] if grouped else slot]
            y = y + (row if gates is None else gates[token, j] * row)
        out.append(y)
    return torch.stack(out) if out else rows.new_zeros(0, rows.size(1))


def silu(v: Tensor) -> Tensor:
    return v / (1 + torch.exp(-v))


def gelu(v: Tensor) -> Tensor:
    return 0.5 * v * (1 + torch.erf(v / math.sqrt(2)))


def gelu_tanh(v: Tensor) -> Tensor:
    # (1 + tanh u) / 2 = 1 / (1 + exp(-2 u)), from the side on which neither it nor its derivative cancels or overflows.
    u = math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)
    decay = torch.exp(-2 * u.abs())
    return v * torch.where(u >= 0, torch.ones_like(v), decay) / (1 + decay)


def relu(v: Tensor) -> Tensor:
    return torch.where(v > 0, v, torch.zeros_like(v))


def activate(
    z: Tensor, activation: str, glu_layout: str = "gate_up", alpha: float = 1.702, limit: float = 7.0
) -> Tensor:
    """The activation of one slot's pre-activations z."""
    plain = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh, "relu": relu}
    if activation in plain:
        return plain[activation](z)
    if activation == "relu2":
        return relu(z) ** 2
    if activation == "identity":
        return z
    half = z.numel() // 2
    if glu_layout == "gate_up":
        gate, up = z[:half], z[half:]
    elif glu_layout == "up_gate":
        up, gate = z[:half], z[half:]
    else:
        gate, up = z[0::2], z[1::2]
    if activation == "swiglu_clamped":
        gate = torch.where(gate < limit, gate, torch.full_like(gate, limit))
        up = torch.where(up < limit, up, torch.full_like(up, limit))
        up = torch.where(up > -limit, up, torch.full_like(up, -limit))
        return (up + 1) * gate / (1 + torch.exp(-alpha * gate))
    return {"swiglu": silu, "geglu": gelu, "geglu_tanh": gelu_tanh, "reglu": relu}[activation](gate) * up


def moe_mlp(
    x: Tensor,
    w_up: Tensor,
    b_up: Tensor | None,
    w_down: Tensor,
    b_down: Tensor | None,
    gates: Tensor,
    expert_ids: Tensor,
    activation: str = "swiglu",
    glu_layout: str = "gate_up",
    alpha: float = 1.702,
    limit: float = 7.0,
) -> Tensor:
    """y[token] = sum over its slots of gate * (w_down[e] @ activate(w_up[e] @ x[token] + b_up[e]) + b_down[e])."""
    expert_ids = expert_ids.unsqueeze(1) if expert_ids.dim() == 1 else expert_ids
    tokens, top_k = expert_ids.shape
    ups, downs, x_rows = w_up.unbind(0), w_down.unbind(0), x.unbind(0)
    up_biases = None if b_up is None else b_up.unbind(0)
    down_biases = None if b_down is None else b_down.unbind(0)
    out = []
    for token in range(tokens):
        y = x.new_zeros(w_down.size(1))
        for j in range(top_k):
            expert = int(expert_ids[token, j])
            if not 0 <= expert < w_up.size(0):
                continue
            z = ups[expert] @ x_rows[token]
            if up_biases is not None:
                z = z + up_biases[expert]
            row = downs[expert] @ activate(z, activation, glu_layout, alpha, limit)
            if down_biases is not None:
                row = row + down_biases[expert]
            y = y + gates[token, j] * row
        out.append(y)
    return torch.stack(out) if out else x.new_zeros(0, w_down.size(1))


def scores(logits: Tensor, scoring: str) -> Tensor:
    """One token's expert scores."""
    if scoring == "sigmoid":
        return 1 / (1 + torch.exp(-logits))
    powers = torch.exp(logits - logits.max().detach())
    return powers / powers.sum()


def gates_of(
    logits: Tensor, expert_ids: Tensor, scoring: str = "softmax", normalize: bool = False, scale: float = 1.0
) -> Tensor:
    """The gates [T, k] of experts that were already chosen."""
    out = []
    for token in range(logits.size(0)):
        chosen = scores(logits[token], scoring)[expert_ids[token]]
        if normalize:
            chosen = chosen / chosen.sum()
        out.append(chosen * scale)
    return torch.stack(out) if out else logits.new_zeros(0, expert_ids.size(1))


def topk_choice(
    logits: Tensor,
    k: int,
    scoring: str = "softmax",
    selection_bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
) -> tuple[list[set[int]], list[float]]:
    """The experts each token chooses, and how far (in score) the closest decision was from going the other way."""
    chosen, margins = [], []
    for token in range(logits.size(0)):
        score = scores(logits[token].detach(), scoring)
        if selection_bias is not None:
            score = score + selection_bias.detach()
        values = score.tolist()
        margin = math.inf
        experts = list(range(len(values)))
        if num_groups > 1:
            size = len(values) // num_groups
            totals = []
            for g in range(num_groups):
                best = sorted(values[g * size : (g + 1) * size], reverse=True)
                totals.append(best[0] if selection_bias is None else sum(best[:2]))
            ranked = sorted(range(num_groups), key=lambda g: -totals[g])
            if top_groups < num_groups:
                margin = totals[ranked[top_groups - 1]] - totals[ranked[top_groups]]
            kept = set(ranked[:top_groups])
            experts = [e for e in experts if e // size in kept]
        experts.sort(key=lambda e: -values[e])
        if k < len(experts):
            margin = min(margin, values[experts[k - 1]] - values[experts[k]])
        chosen.append(set(experts[:k]))
        margins.append(margin)
    return chosen, margins
