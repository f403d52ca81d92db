"""Mixture of attention: every expert is a pair of query and output projections, keys and values are shared."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import functional
from .cache import KVCache, StaticKVCache
from .experts import ExpertParameters, initialize
from .losses import MoEAux
from .rotary import apply_rotary, rotary_embedding
from .routed import RoutedLayer

__all__ = ["JETMOE_KEYS", "AttentionExperts", "MixtureOfAttention"]

# transformers' JetMoeAttention holds the same tensors under these names.
JETMOE_KEYS = {
    "gate.weight": "experts.router.layer.weight",
    "experts.q_proj": "experts.input_linear.weight",
    "experts.o_proj": "experts.output_linear.weight",
    "kv_proj.weight": "kv_proj.weight",
    "bias": "experts.bias",
}


class AttentionExperts(ExpertParameters):
    """The per-expert query and output projections of :class:`MixtureOfAttention`.

    Args:
        num_experts: E.
        hidden_size: H.
        inner_size: ``num_kv_heads * head_dim``, the width of one expert's queries.
        bias: give both projections of every expert a bias.
        init_std: standard deviation of the initial weights.
        device: where to create the parameters.
        dtype: floating dtype of the parameters.

    Parameters: ``q_proj`` ``[E, inner_size, H]``, ``o_proj`` ``[E, H, inner_size]``; with ``bias`` also ``q_proj_bias`` and
    ``o_proj_bias``.

    Example::

        >>> import torch
        >>> from scattermoe.attention import AttentionExperts
        >>> from scattermoe import route
        >>> experts = AttentionExperts(4, hidden_size=16, inner_size=8)
        >>> routing = route(torch.randint(4, (5, 2)), 4)
        >>> experts.queries(torch.randn(5, 16), routing).shape
        torch.Size([10, 8])

    Source: Mixture of Attention Heads, https://arxiv.org/abs/2210.05144.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        inner_size: int,
        *,
        bias: bool = False,
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.inner_size = inner_size
        self.init_std = init_std
        self._create(
            device,
            dtype,
            q_proj=(num_experts, inner_size, hidden_size),
            o_proj=(num_experts, hidden_size, inner_size),
            q_proj_bias=(num_experts, inner_size) if bias else None,
            o_proj_bias=(num_experts, hidden_size) if bias else None,
        )

    def extra_repr(self) -> str:
        """Sizes, for ``print(module)``."""
        return f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, inner_size={self.inner_size}"

    def queries(self, x: Tensor, routing: functional.Routing) -> Tensor:
        """Project tokens to the queries of their experts.

        Args:
            x: tokens ``[T, H]``.
            routing: from :func:`scattermoe.route`.

        Returns:
            ``[T * K, inner_size]``: row ``t * K + j`` is token t's query from its j-th expert.
        """
        return functional.parallel_linear(x, self.q_proj, routing, bias=self.q_proj_bias)

    def forward(self, rows: Tensor, gates: Tensor, routing: functional.Routing) -> Tensor:
        """Project what each expert attended to and add it up, weighted by the gates.

        Args:
            rows: ``[T * K, inner_size]`` in slot order.
            gates: ``[T, K]``.
            routing: the one that made the queries.

        Returns:
            ``[T, H]``.
        """
        # Sorted rows are written as they come; the sum over a token's experts gathers them anyway.
        rows = functional.parallel_linear(rows, self.o_proj, routing, bias=self.o_proj_bias, grouped_out=True)
        return functional.combine(rows, gates, routing)


class MixtureOfAttention(RoutedLayer):
    """Attention whose query heads are chosen per token by a router.

    Each of the E experts owns ``num_kv_heads`` query heads and their part of the output projection; a token uses K experts,
    so ``K * num_kv_heads`` heads attend. Head h of every expert reads key-value head h: grouped-query attention in which
    the group is the token's choice.

    Args:
        hidden_size: H, width of the tokens.
        num_experts: E.
        top_k: K, experts per token; at most E.
        num_kv_heads: heads of keys and values, and query heads of each expert.
        head_dim: D, width of a head.
        causal: a token attends to itself and those before it.
        rope_theta: base of the rotary positions; None for no rotary positions.
        bias: add one output bias ``[H]`` to every token (JetMoE has it).
        expert_bias: give every expert's query and output projections a bias.
        kv_bias: give the key-value projection a bias.
        dropout: dropout on the attention weights in training.
        attention_scale: factor on the scores; None for ``head_dim ** -0.5``.
        router_bias: give the router a bias.
        scoring: ``"softmax"`` or ``"sigmoid"``.
        normalize_gates: make a token's gates add up to one; None does so when ``top_k > 1`` (JetMoE), ``"detach"`` does
            it as Zhang et al. See :class:`TopKRouter`.
        selection_bias: keep a bias for balancing without a loss; see :meth:`update_selection_bias`.
        num_groups: groups of experts for group-limited routing.
        top_groups: how many groups serve a token.
        scale: factor on all gates.
        jitter: multiplicative noise on the router's input in training.
        aux_losses: compute the two losses of :class:`MoEAux`.
        balance: balance over the ``"batch"`` or within each ``"sequence"``.
        init_std: standard deviation of the initial weights.
        device: where to create the parameters.
        dtype: floating dtype of the parameters.

    State dict, and where transformers' ``JetMoeAttention`` keeps the same tensor (``JETMOE_KEYS`` is this table):

    ================== =============== ================================
    ``gate.weight``    ``[E, H]``      ``experts.router.layer.weight``
    ``experts.q_proj`` ``[E, hD, H]``  ``experts.input_linear.weight``
    ``experts.o_proj`` ``[E, H, hD]``  ``experts.output_linear.weight``
    ``kv_proj.weight`` ``[2hD, H]``    ``kv_proj.weight``, keys first
    ``bias``           ``[H]``         ``experts.bias``
    ================== =============== ================================

    with h the key-value heads and D their width. JetMoE is ``MixtureOfAttention(hidden_size, num_local_experts,
    num_experts_per_tok, num_key_value_heads, kv_channels, bias=True, rope_theta=...)``.

    Raises:
        ValueError: ``top_k`` above ``num_experts``, an odd ``head_dim`` with rotary positions, an unknown name.

    Example::

        >>> import torch
        >>> from scattermoe import MixtureOfAttention
        >>> attention = MixtureOfAttention(hidden_size=32, num_experts=8, top_k=2, num_kv_heads=2, head_dim=8)
        >>> x = torch.randn(1, 6, 32)
        >>> y, aux = attention(x)
        >>> cache = attention.make_cache()
        >>> steps = [attention(x[:, t : t + 1], cache=cache)[0] for t in range(6)]
        >>> torch.allclose(torch.cat(steps, dim=1), y, atol=1e-5)
        True

    Source: Mixture of Attention Heads, https://arxiv.org/abs/2210.05144; JetMoE, https://arxiv.org/abs/2404.07413; Scattered
    Mixture-of-Experts, https://arxiv.org/abs/2403.08245.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        causal: bool = True,
        rope_theta: float | None = 10000.0,
        bias: bool = False,
        expert_bias: bool = False,
        kv_bias: bool = False,
        dropout: float = 0.0,
        attention_scale: float | None = None,
        router_bias: bool = False,
        scoring: str = "softmax",
        normalize_gates: bool | str | None = None,
        selection_bias: bool = False,
        num_groups: int = 1,
        top_groups: int = 1,
        scale: float = 1.0,
        jitter: float = 0.0,
        aux_losses: bool = True,
        balance: str = "batch",
        init_std: float = 0.02,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if num_kv_heads < 1 or head_dim < 1:
            raise ValueError(f"expected num_kv_heads and head_dim >= 1, got {num_kv_heads} and {head_dim}")
        if rope_theta is not None and head_dim % 2:
            raise ValueError(f"expected an even head_dim for rotary positions, got {head_dim}")
        if not 0 <= dropout < 1:
            raise ValueError(f"expected 0 <= dropout < 1, got {dropout}")
        super().__init__(
            hidden_size,
            num_experts,
            top_k,
            scoring=scoring,
            normalize_gates=normalize_gates,
            selection_bias=selection_bias,
            num_groups=num_groups,
            top_groups=top_groups,
            scale=scale,
            jitter=jitter,
            bias=router_bias,
            aux_losses=aux_losses,
            balance=balance,
            init_std=init_std,
            device=device,
            dtype=dtype,
        )
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.causal = causal
        self.rope_theta = rope_theta
        self.dropout = dropout
        self.attention_scale = head_dim**-0.5 if attention_scale is None else attention_scale
        inner_size = num_kv_heads * head_dim
        self.experts = AttentionExperts(
            num_experts, hidden_size, inner_size, bias=expert_bias, init_std=init_std, device=device, dtype=dtype
        )
        self.kv_proj = nn.Linear(hidden_size, 2 * inner_size, bias=kv_bias, device=device, dtype=dtype)
        output_bias = nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype)) if bias else None
        self.register_parameter("bias", output_bias)
        self._reset_own_parameters()

    def reset_parameters(self) -> None:
        """Initialise everything again, for instance after construction on the meta device and ``to_empty``."""
        self.gate.reset_parameters()
        self.experts.reset_parameters()
        self._reset_own_parameters()

    def _reset_own_parameters(self) -> None:
        initialize(self.kv_proj.named_parameters(), self.init_std)
        initialize(self.named_parameters(recurse=False), self.init_std)

    def extra_repr(self) -> str:
        """Sizes, for ``print(module)``."""
        return (
            f"top_k={self.top_k}, num_kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, causal={self.causal}, "
            f"rope_theta={self.rope_theta}"
        )

    def make_cache(
        self, batch_size: int | None = None, max_length: int | None = None, *, dtype: torch.dtype | None = None
    ) -> KVCache | StaticKVCache:
        """Make an empty cache for decoding.

        Args:
            batch_size: B, needed for a cache of fixed size.
            max_length: number of positions of a cache of fixed size; None for one that grows.
            dtype: dtype of a cache of fixed size; the layer's by default (under autocast, autocast's is needed).

        Returns:
            A :class:`KVCache` or :class:`StaticKVCache`.

        Raises:
            ValueError: only one of ``batch_size`` and ``max_length`` was given.
        """
        if (batch_size is None) != (max_length is None):
            raise ValueError(
                f"expected batch_size and max_length together, got batch_size={batch_size} and max_length={max_length}"
            )
        if max_length is None:
            return KVCache()
        weight = self.kv_proj.weight
        return StaticKVCache(
            batch_size,
            self.num_kv_heads,
            max_length,
            self.head_dim,
            device=weight.device,
            dtype=weight.dtype if dtype is None else dtype,
        )

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        cache: KVCache | StaticKVCache | None = None,
    ) -> tuple[Tensor, MoEAux]:
        """Run the layer.

        Args:
            x: tokens ``[B, S, H]`` or ``[S, H]``.
            attention_mask: one of

                * ``[B, L]`` (``[L]`` for ``[S, H]``) bool or integer, nonzero for real tokens, over all keys (with a cache: those it holds and the
                  new ones; a static cache ignores columns beyond). Padding is attended by none, goes to no expert, and is
                  left out of the losses and the load; its output is the bias or zero.
                * ``[B or 1, 1, S, L]`` bool (True attends) or floating (added to the scores). It says everything: ``causal``
                  is not applied on top, and all tokens are routed.
            position_ids: ``[S]`` or ``[B, S]`` integer positions for the rotary embedding; by default they count from what
                the cache holds.
            position_embeddings: ``(cos, sin)``, ``[S, D]`` or ``[B, S, D]`` from :func:`scattermoe.rotary.rotary_embedding`,
                to compute them once for all layers, or to bring other frequencies.
            cache: from :meth:`make_cache`; the new keys and values are added to it.

        Returns:
            ``(y, aux)``: y shaped like x, and :class:`MoEAux`.

        Raises:
            ValueError: shapes that do not fit.
        """
        if x.dim() not in (2, 3) or x.size(-1) != self.hidden_size:
            raise ValueError(f"expected x of shape [batch, sequence, {self.hidden_size}], got {list(x.shape)}")
        if x.dim() == 2:
            if attention_mask is not None and attention_mask.dim() == 1:
                attention_mask = attention_mask.unsqueeze(0)
            y, aux = self.forward(
                x.unsqueeze(0),
                attention_mask,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                cache=cache,
            )
            return y.squeeze(0), aux._replace(router_logits=aux.router_logits.squeeze(0))

        batch, length, _ = x.shape
        tokens = x.reshape(-1, self.hidden_size)
        past = 0 if cache is None else cache.length
        positions = torch.arange(length, device=x.device) + past

        gates, expert_ids, logits = self.gate(tokens)
        token_mask = None
        if attention_mask is not None and attention_mask.dim() == 2:
            token_mask = self._query_mask(attention_mask, batch, length, past, positions)
            expert_ids = expert_ids.where(token_mask.reshape(-1, 1), self.num_experts)
        routing = functional.route(expert_ids, self.num_experts)

        # [B, S, K, heads, D] -> [B, heads, K, S, D]: query heads that read the same key head become neighbours.
        query = self.experts.queries(tokens, routing)
        query = query.view(batch, length, self.top_k, self.num_kv_heads, self.head_dim).permute(0, 3, 2, 1, 4)
        key, value = self.kv_proj(x).chunk(2, dim=-1)
        key = key.view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        value = value.view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        if position_embeddings is None and self.rope_theta is not None:
            rotate_by = positions if position_ids is None else position_ids
            position_embeddings = rotary_embedding(rotate_by, self.head_dim, self.rope_theta, query.dtype)
        if position_embeddings is not None:
            cos, sin = (self._spread(part, batch, length) for part in position_embeddings)
            query = apply_rotary(query, cos.unsqueeze(2), sin.unsqueeze(2))
            key = apply_rotary(key, cos, sin)
        # The mask comes first: a static cache's length moves on in place.
        keys = cache.max_length if isinstance(past, Tensor) else past + length
        mask, causal = self._mask(attention_mask, token_mask, positions, past, keys)
        if cache is not None:
            key, value = cache.update(key, value)
        # cuDNN plans anew for every length, at many times the cost of a decoding step.
        grows = isinstance(cache, KVCache) and query.is_cuda and not torch.compiler.is_compiling()
        with _kernels_without_plans() if grows else contextlib.nullcontext():
            attended = self._attend(query, key, value, mask, causal)
        rows = attended.permute(0, 3, 2, 1, 4).reshape(batch * length * self.top_k, self.experts.inner_size)
        y = self.experts(rows, gates, routing).view(batch, length, self.hidden_size)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        aux = self._aux(logits, expert_ids, routing.expert_offsets, x.shape[:-1], token_mask)
        return y, aux

    def _spread(self, part: Tensor, batch: int, length: int) -> Tensor:
        """Bring cosines or sines ``[S, D]`` or ``[B, S, D]`` to ``[B or 1, 1, S, D]``."""
        expected = (length, self.head_dim)
        if (
            part.dim() not in (2, 3)
            or part.shape[-2:] != expected
            or (part.dim() == 3 and part.size(0) not in (1, batch))
        ):
            raise ValueError(
                f"expected positions for [{length}] or [{batch}, {length}] tokens and head_dim={self.head_dim}, "
                f"got rotary embeddings of shape {list(part.shape)}"
            )
        return part.unsqueeze(-3) if part.dim() == 3 else part[None, None]

    def _query_mask(
        self, attention_mask: Tensor, batch: int, length: int, past: int | Tensor, positions: Tensor
    ) -> Tensor:
        """Which of the new tokens are real, ``[B, S]`` bool."""
        if attention_mask.size(0) != batch:
            raise ValueError(f"expected attention_mask.size(0) == x.size(0), got {attention_mask.size(0)} and {batch}")
        if isinstance(past, Tensor):
            return attention_mask.bool().index_select(1, positions)
        if attention_mask.size(1) != past + length:
            raise ValueError(
                f"expected attention_mask.size(1) == cached + new positions = {past + length}, got {attention_mask.size(1)}"
            )
        return attention_mask[:, past:].bool()

    def _mask(
        self,
        attention_mask: Tensor | None,
        token_mask: Tensor | None,
        positions: Tensor,
        past: int | Tensor,
        keys: int,
    ) -> tuple[Tensor | None, bool]:
        """Say who attends to whom: a mask that broadcasts to ``[B, heads, S, L]``, or None with the causal flag."""
        length = positions.size(0)
        if attention_mask is not None and token_mask is None:
            shape = attention_mask.shape
            if len(shape) != 4 or shape[1] != 1 or shape[2] not in (1, length) or shape[3] < keys:
                raise ValueError(
                    f"expected attention_mask of shape [batch, {keys}] or [batch, 1, {length}, {keys}], got {list(shape)}"
                )
            return attention_mask[..., :keys], False
        static = isinstance(past, Tensor)
        if token_mask is None and not static:
            if not self.causal or length == 1:
                return None, False  # the newest token attends to all
            if past == 0:
                return None, True

        key_positions = torch.arange(keys, device=positions.device)
        mask = None
        if self.causal:
            mask = key_positions <= positions.unsqueeze(1)
        elif static:
            mask = (key_positions < past + length).unsqueeze(0)
        if token_mask is not None:
            real = attention_mask.bool()
            if static:
                real = F.pad(real, (0, keys - real.size(1)))
            if self.causal:
                # Padding attends to itself, so that no row is without keys: such a row could become NaN.
                mask = mask & (real.unsqueeze(1) | (key_positions == positions.unsqueeze(1)))
            else:
                seen = real.unsqueeze(1) if mask is None else real.unsqueeze(1) & mask
                mask = seen | ~seen.any(-1, keepdim=True)
            mask = mask.unsqueeze(1)
        return mask, False

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Attention of queries ``[B, heads, K, S, D]`` to keys ``[B, heads, L, D]``."""
        group, length = query.shape[2:4]
        options = {
            "attn_mask": mask if mask is None or mask.dtype == torch.bool else mask.to(query.dtype),
            "dropout_p": self.dropout if self.training else 0.0,
            "scale": self.attention_scale,
        }
        if not causal and (mask is None or mask.size(-2) == 1):
            # All of a head's queries see the same keys, whichever expert or position they come from: no groups needed.
            output = F.scaled_dot_product_attention(query.flatten(2, 3), key, value, **options)
            return output.unflatten(2, (group, length))
        grouped = group > 1
        if grouped and query.is_cuda and not (mask is None and query.dtype in (torch.float16, torch.bfloat16)):
            # The fused CUDA kernel that takes any mask and float32 knows no groups; copies of the keys are cheaper than
            # the unfused way, which would store all scores.
            key = key.repeat_interleave(group, dim=1)
            value = value.repeat_interleave(group, dim=1)
            grouped = False
        output = F.scaled_dot_product_attention(
            query.flatten(1, 2), key, value, is_causal=causal, enable_gqa=grouped, **options
        )
        return output.unflatten(1, (self.num_kv_heads, group))


def _kernels_without_plans() -> contextlib.AbstractContextManager:
    """Allow the attention kernels that are allowed now, except cuDNN's."""
    cuda = torch.backends.cuda
    allowed = {
        SDPBackend.FLASH_ATTENTION: cuda.flash_sdp_enabled(),
        SDPBackend.EFFICIENT_ATTENTION: cuda.mem_efficient_sdp_enabled(),
        SDPBackend.MATH: cuda.math_sdp_enabled(),
    }
    kernels = [kernel for kernel, yes in allowed.items() if yes]
    return sdpa_kernel(kernels) if kernels else contextlib.nullcontext()
