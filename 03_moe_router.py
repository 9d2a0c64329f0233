# /// script
# requires-python = ">=3.11"
# dependencies = ["torch>=2.11,<=2.13", "matplotlib>=3.8", "numpy>=1.26"]
# ///
r"""03 · DeepSeekMoE: many small experts, a few for each token, kept busy by a bias instead of a loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


# %% 2. The piece ----------------------------------------------------------------------------
# >>> copy: Router, SwiGLU, MoE, grouped_gemm, sequence_balance_loss (needs torch)
from collections.abc import Callable


class Router(nn.Module):
    """Which experts serve a token, and with what weight (V3 eq. 12-16): x (N, D) -> K of E experts.

    topk_method: "noaux_tc" is V3's (a bias chooses, groups rank by the sum of their best two),
    "group_limited_greedy" V2's (no bias, groups rank by their best one), "greedy" has no groups.
    """

    def __init__(
        self,
        hidden_size: int,
        n_routed_experts: int,
        num_experts_per_tok: int,
        n_group: int = 1,
        topk_group: int = 1,
        routed_scaling_factor: float = 1.0,
        norm_topk_prob: bool = True,
        scoring_func: str = "sigmoid",
        topk_method: str = "noaux_tc",
    ):
        super().__init__()
        E, K, G = n_routed_experts, num_experts_per_tok, n_group
        if scoring_func not in ("sigmoid", "softmax"):
            raise ValueError(f"scoring_func must be 'sigmoid' or 'softmax', got {scoring_func!r}")
        if topk_method not in ("noaux_tc", "group_limited_greedy", "greedy"):
            raise ValueError(f"unknown topk_method {topk_method!r}")
        if E % G or not 1 <= topk_group <= G or not 1 <= K <= E // G * topk_group:
            raise ValueError(f"cannot choose {K} of {E} experts in {topk_group} of {G} groups")
        if topk_method == "noaux_tc" and 1 < G == E:
            raise ValueError(f"a group's rank is the sum of its best two, {G} groups hold one each")
        self.experts, self.top_k, self.scaling = E, K, routed_scaling_factor
        self.groups, self.top_groups = (1, 1) if topk_method == "greedy" else (G, topk_group)
        self.normalise, self.scoring = norm_topk_prob, scoring_func
        self.best_of_group = 2 if topk_method == "noaux_tc" else 1
        self.weight = nn.Parameter(torch.empty(E, hidden_size))
        nn.init.normal_(self.weight, std=hidden_size**-0.5)
        bias = torch.zeros(E, dtype=torch.float32) if topk_method == "noaux_tc" else None
        self.register_buffer("e_score_correction_bias", bias)

    def _apply(self, fn, recurse=True):
        """Keep the bias in fp32 when the model goes to bf16: rounded, distinct experts would tie."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if bias is not None and self.e_score_correction_bias.dtype != torch.float32:
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (N, D) -> experts (N, K) int64, their weights (N, K) fp32, all scores (N, E) fp32."""
        with torch.autocast(x.device.type, enabled=False):  # bf16 scores would decide near-ties
            wide = torch.promote_types(x.dtype, torch.float32)
            logits = F.linear(x.to(wide), self.weight.to(wide))
        scores = logits.sigmoid() if self.scoring == "sigmoid" else logits.softmax(-1)
        indices = self.choose(scores.detach())
        weights = scores.gather(1, indices)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return indices, weights * self.scaling, scores

    def choose(self, scores: Tensor) -> Tensor:
        """scores: (N, E) -> the chosen experts (N, K). Here alone does the bias enter."""
        choice = (
            scores
            if self.e_score_correction_bias is None
            else scores + self.e_score_correction_bias
        )
        if self.groups > 1:
            grouped = choice.unflatten(-1, (self.groups, -1))  # (N, G, E/G)
            rank = grouped.topk(self.best_of_group, -1).values.sum(-1)  # (N, G)
            kept = rank.topk(self.top_groups, -1).indices
            dropped = torch.ones_like(rank, dtype=torch.bool).scatter_(-1, kept, False)
            # -inf and not 0: a biased score can be negative, and must still beat a dropped group
            choice = grouped.masked_fill(dropped[..., None], float("-inf")).flatten(-2)
        return choice.topk(self.top_k, -1, sorted=False).indices

    @torch.no_grad()
    def update_bias(self, load: Tensor, gamma: float, center: bool = False) -> None:
        """After an optimizer step: the overloaded become less likely, the idle more (V3 §2.1.2).

        load: (E,) tokens each expert got in the whole batch, summed over micro-batches and devices.
        center: subtract the mean step, which changes no choice but keeps the bias from drifting.
        """
        load = load.to(self.e_score_correction_bias)
        step = (load.mean() - load).sign()
        self.e_score_correction_bias += gamma * (step - step.mean() if center else step)


class _GroupedGemm(torch.autograd.Function):
    """One product an expert, each written straight into its rows of the result: no copies."""

    @staticmethod
    def forward(ctx, x, weight, sizes):
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes = sizes.tolist()
        y = x.new_empty(len(x), weight.shape[1])
        for rows, w, out in zip(x.split(sizes), weight.unbind(), y.split(sizes), strict=True):
            torch.mm(rows, w.T, out=out)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        dx, dw = torch.empty_like(x), torch.empty_like(weight)
        for g, rows, w, dx_out, dw_out in zip(
            grad.split(ctx.sizes),
            x.split(ctx.sizes),
            weight.unbind(),  # weight[e] would zero-fill the whole stack once an expert in backward
            dx.split(ctx.sizes),
            dw.unbind(),
            strict=True,
        ):
            torch.mm(g, w, out=dx_out)
            torch.mm(g.T, rows, out=dw_out)  # an expert without rows gets zeros
        return dx, dw, None


def grouped_gemm(x: Tensor, weight: Tensor, sizes: Tensor) -> Tensor:
    """x: (M, A) rows sorted by expert, weight: (E, B, A), sizes: (E,) rows of each -> (M, B)."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    return _GroupedGemm.apply(x, weight, sizes)


class _Dispatch(torch.autograd.Function):
    """x (N, D) -> rows (N·K, D) sorted by expert; backward is combine: each token sums its K rows."""

    @staticmethod
    def forward(ctx, x, token_of_row, rows_of_token):
        ctx.save_for_backward(token_of_row, rows_of_token)
        return x[token_of_row]

    @staticmethod
    def backward(ctx, grad):
        _, rows_of_token = ctx.saved_tensors
        return F.embedding_bag(rows_of_token, grad, mode="sum"), None, None


class _Combine(torch.autograd.Function):
    """rows (N·K, D) -> y (N, D), each token the sum of its K rows; backward is dispatch."""

    @staticmethod
    def forward(ctx, rows, token_of_row, rows_of_token):
        ctx.save_for_backward(token_of_row)
        return F.embedding_bag(rows_of_token, rows, mode="sum")

    @staticmethod
    def backward(ctx, grad):
        (token_of_row,) = ctx.saved_tensors
        return grad[token_of_row], None, None


def swiglu(gate_up: Tensor) -> Tensor:
    """(..., 2I) -> (..., I): silu(gate)·up, the gate first."""
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


class SwiGLU(nn.Module):
    """down(silu(gate x)·up x): (..., D) -> (..., D); the dense layers, and the shared experts."""

    def __init__(self, hidden_size: int, intermediate_size: int, linear: Callable = nn.Linear):
        super().__init__()
        self.gate_proj = linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """E SwiGLUs as two stacked parameters: gate_up_proj (E, 2I, D), down_proj (E, D, I)."""

    def __init__(
        self, experts: int, hidden_size: int, intermediate_size: int, grouped_gemm: Callable
    ):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * intermediate_size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, intermediate_size))
        nn.init.normal_(self.gate_up_proj, std=hidden_size**-0.5)
        nn.init.normal_(self.down_proj, std=intermediate_size**-0.5)
        self.grouped_gemm = grouped_gemm

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor, load: Tensor) -> Tensor:
        """x: (N, D), its experts (N, K) and their weights (N, K), tokens of each (E,) -> (N, D)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(
                torch.get_autocast_dtype(x.device.type)
            )  # once, before each row is copied K times
        N, K = indices.shape
        order = indices.flatten().argsort(stable=True)  # rows by expert: the whole dispatch
        token_of_row = order // K
        rows_of_token = torch.empty_like(order)
        rows_of_token[order] = torch.arange(N * K, device=order.device)
        routes = token_of_row, rows_of_token.view(N, K)
        rows = _Dispatch.apply(x, *routes)  # (N·K, D)
        hidden = swiglu(self.grouped_gemm(rows, self.gate_up_proj, load))  # (N·K, I)
        # w·(W h) = W (w·h): the weight meets the narrow side, and combine is a plain sum
        hidden = hidden * weights.flatten()[order, None].to(hidden.dtype)
        return _Combine.apply(self.grouped_gemm(hidden, self.down_proj, load), *routes)


class MoE(nn.Module):
    """Shared expert + K of E routed ones, no token dropped (V3 eq. 12): (B, T, D) -> (B, T, D).

    A training forward leaves `load` (E,), the tokens each expert got, and `balance_loss`, eq. 17
    without α. Both are overwritten, never added to: recomputing a forward counts nothing twice.
    """

    def __init__(
        self,
        hidden_size: int,
        moe_intermediate_size: int,
        n_routed_experts: int,
        num_experts_per_tok: int,
        n_shared_experts: int = 1,
        linear: Callable[..., nn.Module] = nn.Linear,
        grouped_gemm: Callable[..., Tensor] = grouped_gemm,
        **router,
    ):
        super().__init__()
        self.gate = Router(hidden_size, n_routed_experts, num_experts_per_tok, **router)
        self.experts = Experts(n_routed_experts, hidden_size, moe_intermediate_size, grouped_gemm)
        shared = n_shared_experts * moe_intermediate_size
        self.shared_experts = SwiGLU(hidden_size, shared, linear) if shared else None
        self.load: Tensor | None = None
        self.balance_loss: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)  # (N, D), N = B·T
        indices, weights, scores = self.gate(flat)
        load = torch.zeros(self.gate.experts, dtype=torch.long, device=x.device)
        load.scatter_add_(0, indices.flatten(), torch.ones_like(indices.flatten()))
        self.load, self.balance_loss = load, None
        if self.training:
            B, T = x.shape[0], x.shape[1:-1].numel()
            self.balance_loss = sequence_balance_loss(scores.view(B, T, -1), indices.view(B, T, -1))
        y = self.experts(flat, indices, weights, load).view_as(x)
        return y if self.shared_experts is None else y + self.shared_experts(x)


def sequence_balance_loss(scores: Tensor, indices: Tensor) -> Tensor:
    """Σ f_i·P_i, averaged over sequences (V3 eq. 17-20 without α): 1 when perfectly even.

    scores: (B, T, E), indices: (B, T, K). f counts the experts that were chosen, bias and groups
    included, as most code does; the paper prints the top K of the bare scores. f has no gradient.
    """
    _, T, E = scores.shape
    chosen = indices.flatten(1)  # (B, T·K)
    counts = scores.new_zeros(len(scores), E).scatter_add_(1, chosen, scores.new_ones(chosen.shape))
    frequency = counts * E / chosen.shape[1]  # f: (B, E), E/(K·T)·count
    share = (scores / scores.sum(-1, keepdim=True)).mean(1)  # P: (B, E)
    return (frequency * share).sum(-1).mean()


def max_violation(load: Tensor) -> Tensor:
    """(max load - mean load) / mean load over the last axis (arXiv:2408.15664, eq. 4); 0 is even."""
    mean = load.double().mean(-1)
    return (load.double().amax(-1) - mean) / mean


# <<< copy
