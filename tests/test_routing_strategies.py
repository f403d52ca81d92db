"""Capacity, expert choice and token rounding against lists: who is in whose list, and what comes out of a whole layer."""

import math

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.testing import assert_close

import scattermoe
from scattermoe import MoE, expert_capacity, expert_choice, limit_capacity, round_to_tiles, route, topk_gating
from tests.cases import make_ids


def ranked(slots: list[int], gates: list[float]) -> list[int]:
    """Slots by falling gate, the earlier first among equal ones."""
    return sorted(slots, key=lambda slot: (-gates[slot], slot))


def keep_capacity(ids: Tensor, experts: int, capacity: list[int], gates: Tensor | None) -> Tensor:
    kept = torch.full((ids.numel(),), experts)
    flat = ids.flatten().tolist()
    for e in range(experts):
        slots = [slot for slot, expert in enumerate(flat) if expert == e]
        if gates is not None:
            slots = ranked(slots, gates.flatten().tolist())
        kept[slots[: capacity[e]]] = e
    return kept.view(ids.shape)


@pytest.mark.parametrize("routing", ["uniform", "skewed", "sentinels", "one_expert", "all_sentinels"])
@pytest.mark.parametrize("by_gate", [False, True], ids=["position", "gate"])
@pytest.mark.parametrize("capacity", [0, 1, 7, 1000])
def test_capacity(device: str, routing: str, by_gate: bool, capacity: int) -> None:
    ids = make_ids(40, 3, 5, routing, 1)
    gates = (torch.rand(40, 3) * 10).round() / 10 if by_gate else None  # many equal ones
    got = limit_capacity(ids.to(device), 5, capacity, None if gates is None else gates.to(device))
    assert got.dtype == torch.int64 and got.device.type == device
    assert torch.equal(got.cpu(), keep_capacity(ids, 5, [capacity] * 5, gates))


def test_capacity_of_each_expert_and_from_the_device(device: str) -> None:
    ids, gates = make_ids(40, 3, 5, "uniform", 2), torch.rand(40, 3)
    each = [0, 3, 100, 5, 1]
    got = limit_capacity(ids.to(device), 5, torch.tensor(each, device=device), gates.to(device))
    assert torch.equal(got.cpu(), keep_capacity(ids, 5, each, gates))
    got = limit_capacity(ids.to(device), 5, torch.tensor(4, device=device))
    assert torch.equal(got.cpu(), keep_capacity(ids, 5, [4] * 5, None))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_capacity_of_narrow_ids(device: str, dtype: torch.dtype) -> None:
    """256 experts do not fit into a byte, their sentinel even less."""
    ids = make_ids(30, 2, 5, "uniform", 3, dtype).to(device)
    assert torch.equal(limit_capacity(ids, 256, 2), limit_capacity(ids.long(), 256, 2))


def test_capacity_by_position_is_causal() -> None:
    ids = make_ids(40, 2, 5, "skewed", 4)
    for tokens in (1, 10, 25):
        assert torch.equal(limit_capacity(ids, 5, 6)[:tokens], limit_capacity(ids[:tokens], 5, 6))


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.25, 2.0])
def test_expert_capacity(device: str, factor: float) -> None:
    for tokens in (0, 1, 7, 64, 1000):
        want = -(-int(tokens * 2 * factor * 4) // (4 * 8))
        assert expert_capacity(tokens, 8, 2, factor) == want
        assert expert_capacity(torch.tensor(tokens, device=device), 8, 2, factor).item() == want


def choose_tokens(scores: Tensor, capacity: int, limit: int, mask: Tensor | None) -> list[list[int]]:
    """The experts of each token, best first."""
    experts: list[list[int]] = [[] for _ in scores]
    for e in range(scores.size(1)):
        column = scores[:, e].tolist()
        tokens = [t for t in range(len(column)) if mask is None or bool(mask[t])]
        for t in ranked(tokens, column)[:capacity]:
            experts[t].append(e)
    return [ranked(chosen, row)[:limit] for chosen, row in zip(experts, scores.tolist(), strict=True)]


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize("limit", [1, 2, 6])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_expert_choice(device: str, scoring: str, limit: int, masked: bool) -> None:
    logits = torch.randn(30, 6, device=device, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(30, device=device) < 0.7 if masked else None
    gates, ids = expert_choice(logits, 8, limit, scoring=scoring, token_mask=mask)
    scores = logits.exp() / logits.exp().sum(1, keepdim=True) if scoring == "softmax" else 1 / (1 + (-logits).exp())
    chosen = choose_tokens(scores.detach(), 8, limit, mask)
    assert ids.tolist() == [row + [6] * (limit - len(row)) for row in chosen]
    if limit == 6:
        assert route(ids, 6).expert_counts.tolist() == [8] * 6
    zero = scores.new_zeros(())
    want = torch.stack(
        [scores[t, row[j]] if j < len(row) else zero for t, row in enumerate(chosen) for j in range(limit)]
    )
    assert_close(gates, want.view(30, limit))
    weight = torch.randn_like(gates)
    assert_close(*(torch.autograd.grad((g * weight).sum(), logits)[0] for g in (gates, want.view(30, limit))))


def round_by_lists(
    gates: Tensor, ids: Tensor, scores: Tensor, tile: int, rounding: str, limit: int
) -> list[dict[int, float]]:
    """Each token's experts and gates, by the lists of the experts: own tokens by gate, then others by score."""
    tokens, experts = scores.shape
    pairs = [zip(*row, strict=True) for row in zip(ids.tolist(), gates.tolist(), strict=True)]
    own = [{e: gate for e, gate in row if 0 <= e < experts} for row in pairs]
    result: list[dict[int, float]] = [{} for _ in range(tokens)]
    others = []  # the best experts of each token that are not its own, as many as there are slots
    for t, row in enumerate(scores.tolist()):
        rest = ranked([e for e in range(experts) if e not in own[t]], row)
        others.append(rest[: limit - ids.size(1)] if own[t] else [])
    for e in range(experts):
        mine = [t for t in range(tokens) if e in own[t]]
        more = [t for t in range(tokens) if e in others[t]] if rounding != "down" else []
        count = {"nearest": math.floor(len(mine) / tile + 0.5), "up": math.ceil(len(mine) / tile), "down": 0}[rounding]
        if rounding == "down" or count * tile > len(mine) + len(more):
            count = (len(mine) + len(more)) // tile
        places = sorted(mine, key=lambda t: (-own[t][e], t)) + ranked(more, scores[:, e].tolist())
        for t in places[: count * tile]:
            result[t][e] = own[t].get(e, scores[t, e].item())
    return result


@pytest.mark.parametrize("rounding", ["nearest", "up", "down"])
@pytest.mark.parametrize("tile", [1, 4, 7, 64])
@pytest.mark.parametrize("limit", [2, 3, 6])
@pytest.mark.parametrize("padded", [False, True], ids=["all", "padded"])
def test_token_rounding(device: str, rounding: str, tile: int, limit: int, padded: bool) -> None:
    scores = torch.randn(50, 6, device=device, dtype=torch.float64).softmax(1)
    gates, ids = scores.topk(2)
    gates = gates / gates.sum(1, keepdim=True)
    if padded:
        ids[torch.rand(50, device=device) < 0.3] = 6
        ids[3, 1] = -1
    want = round_by_lists(gates, ids, scores, tile, rounding, limit)
    new_gates, new_ids = round_to_tiles(gates, ids, scores, tile, rounding, limit)
    assert new_ids.shape == new_gates.shape == (50, 2 if rounding == "down" else limit)
    got = [
        {e: g for e, g in zip(i, s, strict=True) if e < 6}
        for i, s in zip(new_ids.tolist(), new_gates.tolist(), strict=True)
    ]
    assert got == want
    assert not (route(new_ids, 6).expert_counts % tile).any()
    # A token's own choices keep their places.
    assert ((new_ids[:, :2] == ids) | (new_ids[:, :2] == 6)).all()


def test_token_rounding_moves_less_than_a_tile() -> None:
    scores = torch.randn(400, 8).softmax(1)
    gates, ids = scores.topk(2)
    before = route(ids, 8).expert_counts
    for rounding, low, high in (("nearest", -8, 8), ("up", 0, 15), ("down", -15, 0)):
        after = route(round_to_tiles(gates, ids, scores, 16, rounding)[1], 8).expert_counts
        assert ((after - before >= low) & (after - before <= high)).all()
        assert not torch.equal(after, before)


def test_token_rounding_gradients(device: str) -> None:
    logits = torch.randn(40, 6, device=device, dtype=torch.float64, requires_grad=True)
    gates, ids = topk_gating(logits, 2, normalize=True)
    gates, ids = round_to_tiles(gates, ids, logits.softmax(1), 8, "up", 4)
    scores = logits.exp() / logits.exp().sum(1, keepdim=True)
    own = scores.topk(2).indices
    weight = torch.randn(40, 6, device=device, dtype=torch.float64)
    total = scores.new_zeros(())
    for t in range(40):
        for e in ids[t].tolist():
            if e < 6:
                share = scores[t, own[t]].sum() if e in own[t].tolist() else 1
                total = total + weight[t, e] * scores[t, e] / share
    kept = ids < 6
    got = (gates * weight.gather(1, ids.where(kept, 0)))[kept].sum()
    assert_close(got, total)
    assert_close(torch.autograd.grad(got, logits)[0], torch.autograd.grad(total, logits)[0])


# Every rule of MoE that changes the router's choice, with what its assignment is: experts and gates of each token.
STRATEGIES = {
    "capacity": {"capacity_factor": 0.5},
    "position": {"capacity_factor": 0.5, "drop": "position", "normalize_gates": False},
    "rounding": {"token_rounding": 4},
    "deepseek-rounding": {
        "token_rounding": 4,
        "max_experts": 5,
        "scoring": "sigmoid",
        "scale": 2.5,
        "selection_bias": True,
    },
    "expert-choice": {"routing": "expert_choice", "capacity_factor": 0.5, "scale": 1.5},
    "expert-choice-sigmoid": {"routing": "expert_choice", "scoring": "sigmoid", "max_experts": 3},
}


def assignment_by_lists(moe: MoE, x: Tensor, mask: Tensor | None) -> list[dict[int, Tensor]]:
    """Each token's experts and differentiable gates."""
    gates, ids, logits = moe.gate(x)
    real = range(x.size(0)) if mask is None else mask.nonzero().flatten().tolist()
    scores = logits.softmax(1) if moe.gate.scoring == "softmax" else logits.sigmoid()
    scores = scores * moe.gate.scale
    experts = moe.num_experts
    tokens = [{} for _ in range(x.size(0))]
    factor = 1.0 if moe.capacity_factor is None else moe.capacity_factor
    capacity = math.ceil(len(real) * moe.top_k * factor / experts)
    if moe.routing == "expert_choice":
        for t, row in enumerate(choose_tokens(scores.detach(), capacity, moe.max_experts, mask)):
            tokens[t] = {e: scores[t, e] for e in row}
        return tokens
    ids = ids.clone()
    if mask is not None:
        ids[~mask] = experts
    if moe.token_rounding is None:
        kept = keep_capacity(ids.cpu(), experts, [capacity] * experts, gates if moe.drop == "gate" else None)
        for t in real:
            tokens[t] = {e: gates[t, j] for j, e in enumerate(kept[t].tolist()) if e < experts}
        return tokens
    limit = moe.top_k + 1 if moe.max_experts is None else moe.max_experts
    for t, row in enumerate(round_by_lists(gates, ids, scores, moe.token_rounding, "nearest", limit)):
        own = {e: gates[t, j] for j, e in enumerate(ids[t].tolist())}
        tokens[t] = {e: own.get(e, scores[t, e]) for e in row}
    return tokens


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_layer(device: str, strategy: str, masked: bool) -> None:
    # Drawn on the CPU: the same tokens are dropped on every device.
    moe = MoE(6, 5, 5, 2, dtype=torch.float64, init_std=0.5, **STRATEGIES[strategy])
    if moe.gate.e_score_correction_bias is not None:
        moe.gate.e_score_correction_bias.normal_(std=0.2)
    moe.to(device)
    x = torch.randn(3, 9, 6, dtype=torch.float64).to(device).requires_grad_()
    mask = (torch.rand(3, 9) < 0.7).to(device) if masked else None
    y, aux = moe(x, mask)
    tokens = assignment_by_lists(moe, x.view(27, 6), None if mask is None else mask.flatten())
    up, down = moe.experts.gate_up_proj, moe.experts.down_proj
    rows = []
    for t, experts in enumerate(tokens):
        row = torch.zeros_like(x[0, 0])
        for e, gate in experts.items():
            z = up[e] @ x.view(27, 6)[t]
            row = row + gate * (down[e] @ (torch.nn.functional.silu(z[:5]) * z[5:]))
        rows.append(row)
    want = torch.stack(rows).view_as(x)
    assert_close(y, want)
    assert aux.expert_load.tolist() == [sum(e in chosen for chosen in tokens) for e in range(5)]
    # Tokens that nobody serves are there, and come out as zero.
    unserved = torch.tensor([not chosen for chosen in tokens]).view(3, 9)
    if "rounding" not in strategy or masked:
        assert unserved.any() and not y[unserved].any()

    weight = torch.randn_like(y)
    inputs = [x, *moe.parameters()]
    got = torch.autograd.grad((y * weight).sum(), inputs)
    for a, b in zip(got, torch.autograd.grad((want * weight).sum(), inputs), strict=True):
        assert_close(a, b)


def test_losses_count_what_the_router_chose(device: str) -> None:
    """Dropping hides an imbalance from the load, not from the loss."""
    plain = MoE(8, 4, 6, 2, router_bias=True, device=device)
    torch.nn.init.normal_(plain.gate.bias)
    x = torch.randn(4, 16, 8, device=device)
    mask = torch.rand(4, 16, device=device) < 0.8
    _, want = plain(x, mask)
    for options in ({"capacity_factor": 1.0}, {"token_rounding": 8}):
        for balance in ("batch", "sequence"):
            moe = MoE(8, 4, 6, 2, router_bias=True, balance=balance, device=device, **options)
            moe.load_state_dict(plain.state_dict())
            _, aux = moe(x, mask)
            if balance == "batch":
                assert_close(aux.load_balancing_loss, want.load_balancing_loss)
            assert not torch.equal(aux.expert_load, want.expert_load)
            assert_close(aux.dropped_share, 1 - aux.expert_load.sum() / want.expert_load.sum())
    assert want.dropped_share is None
    assert MoE(8, 4, 6, 2, capacity_factor=1.0, device=device)(x[:0])[1].dropped_share == 0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_padding_changes_nothing(device: str, strategy: str) -> None:
    moe = MoE(6, 5, 5, 2, device=device, dtype=torch.float64, init_std=0.5, **STRATEGIES[strategy])
    x = torch.randn(30, 6, device=device, dtype=torch.float64)
    mask = torch.rand(30, device=device) < 0.6
    padded = x.clone()
    padded[~mask] = math.nan
    y, aux = moe(padded, mask)
    alone, alone_aux = moe(x[mask])
    assert_close(y[mask], alone)
    assert not y[~mask].any()
    assert torch.equal(aux.expert_load, alone_aux.expert_load)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_few_tokens(device: str, strategy: str, tokens: int) -> None:
    moe = MoE(6, 5, 5, 2, device=device, **STRATEGIES[strategy])
    x = torch.randn(tokens, 6, device=device, requires_grad=True)
    y, aux = moe(x)
    (y.sum() + aux.load_balancing_loss).backward()
    assert y.shape == x.shape and y.isfinite().all() and x.grad.isfinite().all()
    assert int(aux.expert_load.sum()) <= tokens * (moe.max_experts or 3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nan_tokens_stay_nan_and_alone(device: str, strategy: str) -> None:
    """A token of NaN may take places, but its NaN reaches no other token."""
    # Drawn on the CPU: the token keeps its places on every device.
    moe = MoE(6, 5, 5, 2, **STRATEGIES[strategy]).to(device)
    x = torch.randn(20, 6).to(device)
    x[7] = math.nan
    y = moe(x)[0]
    others = torch.arange(20, device=device) != 7
    assert y[others].isfinite().all()
    if "rounding" not in strategy:
        assert y[7].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_are_wide_and_autocast_does_not_matter(device: str, dtype: torch.dtype) -> None:
    logits = torch.randn(64, 6, device=device)
    want = expert_choice(logits, 16, 4)
    with torch.autocast(device, dtype=dtype):
        got = expert_choice(logits, 16, 4)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
        gates, ids = topk_gating(logits, 2)
        rounded = round_to_tiles(gates, ids, logits.softmax(1), 8)
        assert rounded[0].dtype == torch.float32
    assert expert_choice(logits.to(dtype), 16, 4)[0].dtype == torch.float32
    assert expert_choice(logits.double(), 16, 4)[0].dtype == torch.float64


@pytest.mark.parametrize("strategy, masked", [(name, number % 2 == 0) for number, name in enumerate(STRATEGIES)])
def test_compile(device: str, fresh_compiler: None, strategy: str, masked: bool) -> None:
    moe = MoE(6, 5, 5, 2, device=device, **STRATEGIES[strategy])
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(moe, fullgraph=True, backend=graphs)
    for tokens in (3, 30, 111):
        x = torch.randn(tokens, 6, device=device, requires_grad=True)
        mask = torch.rand(tokens, device=device) < 0.7 if masked else None
        for tensor in (x,) if mask is None else (x, mask):
            torch._dynamo.mark_dynamic(tensor, 0)
        results = []
        for run in (moe, compiled):
            y, aux = run(x, mask)
            loss = y.square().sum() + aux.load_balancing_loss + aux.z_loss
            values = [y, *(value for value in aux if value is not None)]
            results.append((*values, *torch.autograd.grad(loss, [x, *moe.parameters()])))
        for a, b in zip(*results, strict=True):
            assert_close(a, b)
    assert graphs.frame_count == 1  # other numbers of tokens need no other graph


@pytest.mark.parametrize("strategy", ["capacity", "rounding", "expert-choice"])
def test_export(device: str, strategy: str) -> None:
    moe = MoE(6, 5, 5, 2, device=device, **STRATEGIES[strategy]).eval()
    tokens = torch.export.Dim("tokens", min=2)
    example = torch.randn(30, 6, device=device)
    program = torch.export.export(moe, (example,), dynamic_shapes=({0: tokens},)).module()
    more = torch.randn(51, 6, device=device)
    assert_close(program(more)[0], moe(more)[0])


def test_meta_device() -> None:
    for options in STRATEGIES.values():
        y, aux = MoE(6, 5, 5, 2, device="meta", **options)(torch.empty(7, 6, device="meta"))
        assert y.shape == (7, 6) and aux.expert_load.shape == (5,)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cuda_graph_replays_another_routing(device: str, strategy: str) -> None:
    """Capture is refused where anything waits for the device."""
    if device != "cuda":
        pytest.skip("needs a GPU")
    moe = MoE(16, 8, 5, 2, device=device, **STRATEGIES[strategy])
    x = torch.randn(40, 16, device=device, requires_grad=True)
    mask = torch.ones(40, dtype=torch.bool, device=device)

    def step() -> list[Tensor]:
        y, aux = moe(x, mask)
        return [
            y,
            aux.expert_load,
            *torch.autograd.grad(y.square().sum() + aux.load_balancing_loss, [x, *moe.parameters()]),
        ]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        with torch.no_grad():
            x.normal_()
            mask.copy_(torch.rand(40, device=device) < 0.7)
        graph.replay()
        for a, b in zip(captured, step(), strict=True):
            assert_close(a, b)


IDS, GATES, SCORES = torch.zeros(4, 2, dtype=torch.long), torch.ones(4, 2), torch.ones(4, 3)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: expert_capacity(4, 0), ["num_experts >= 1", "0"]),
        (lambda: expert_capacity(4, 2, 0), ["top_k >= 1", "0"]),
        (lambda: expert_capacity(4, 2, 1, 0.0), ["capacity_factor > 0", "0.0"]),
        (lambda: expert_capacity(4, 2, 1, math.nan), ["capacity_factor > 0", "nan"]),
        (lambda: limit_capacity(IDS, 3, -1), ["capacity >= 0", "-1"]),
        (lambda: limit_capacity(IDS, 3, torch.ones(2)), ["capacity", "[3]", "[2]"]),
        (lambda: limit_capacity(IDS[0], 3, 1), ["expert_ids", "[tokens, choices]", "[2]"]),
        (lambda: limit_capacity(IDS, 3, 1, GATES[:3]), ["gates.shape == expert_ids.shape", "[3, 2]", "[4, 2]"]),
        (lambda: expert_choice(SCORES[0], 1, 1), ["router_logits", "[tokens, experts]", "[3]"]),
        (lambda: expert_choice(SCORES, 1, 4), ["max_experts <= experts", "4", "3"]),
        (lambda: expert_choice(SCORES, 1, 0), ["1 <= max_experts", "0"]),
        (lambda: expert_choice(SCORES, 1, 1, scoring="relu"), ["scoring", "softmax", "'relu'"]),
        (lambda: expert_choice(SCORES, 1, 1, token_mask=torch.ones(3)), ["token_mask", "[4]", "[3]"]),
        (lambda: round_to_tiles(GATES, IDS[:3], SCORES, 2), ["gates.shape == expert_ids.shape", "[4, 2]", "[3, 2]"]),
        (lambda: round_to_tiles(GATES, IDS, SCORES[:3], 2), ["scores", "[4, experts]", "[3, 3]"]),
        (lambda: round_to_tiles(GATES, IDS, SCORES, 0), ["tile >= 1", "0"]),
        (lambda: round_to_tiles(GATES, IDS, SCORES, 2, "near"), ["rounding", "nearest", "'near'"]),
        (lambda: round_to_tiles(GATES, IDS, SCORES, 2, max_experts=1), ["top_k=2", "max_experts=1"]),
        (lambda: round_to_tiles(GATES, IDS, SCORES, 2, max_experts=4), ["max_experts=4", "3 experts"]),
        (lambda: MoE(4, 4, 4, 2, routing="hash"), ["token_choice, expert_choice", "'hash'"]),
        (lambda: MoE(4, 4, 4, 2, drop="random"), ["gate, position", "'random'"]),
        (lambda: MoE(4, 4, 4, 2, capacity_factor=0), ["capacity_factor > 0", "0"]),
        (lambda: MoE(4, 4, 4, 2, token_rounding=0), ["token_rounding >= 1", "0"]),
        (
            lambda: MoE(4, 4, 4, 2, token_rounding=8, capacity_factor=1.5),
            ["token_rounding", "capacity_factor", "8", "1.5"],
        ),
        (lambda: MoE(4, 4, 4, 2, max_experts=3), ["max_experts", "token_rounding", "expert_choice", "3"]),
        (lambda: MoE(4, 4, 4, 2, token_rounding=8, max_experts=1), ["max_experts in [2, 4]", "1"]),
        (lambda: MoE(4, 4, 4, 2, routing="expert_choice", max_experts=5), ["max_experts in [1, 4]", "5"]),
        (lambda: MoE(4, 4, 4, 2, routing="expert_choice", selection_bias=True), ["selection_bias", "True"]),
        (lambda: MoE(4, 4, 4, 2, routing="expert_choice", normalize_gates=True), ["normalize_gates", "True"]),
        (lambda: MoE(4, 4, 4, 2, routing="expert_choice", num_groups=2, top_groups=2), ["num_groups", "2"]),
        (
            lambda: MoE(4, 4, 4, 2, routing="expert_choice", token_rounding=2),
            ["token_rounding", "capacity_factor", "2"],
        ),
    ],
)
def test_bad_input(call, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        call()
    for word in words:
        assert word in str(error.value)


def test_ids_must_be_integers() -> None:
    with pytest.raises(TypeError, match="integer"):
        limit_capacity(torch.rand(3, 2), 4, 1)
    with pytest.raises(TypeError, match="integer"):
        scattermoe.expert_load(torch.rand(3, 2), 4)
