"""03_moe_router.py against loops, transformers, and properties that need no reference."""

import copy
import functools
import importlib.util
from importlib import import_module

import pytest
import torch
from ahead import (
    SHARED_LIMIT,
    compile_few,
    compile_grouped,
    compile_grouped_hopper,
    compile_swiglu,
    interpret,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

moe = import_module("03_moe_router")

EXACT = 1e-12  # float64: sums of at most a few hundred terms of size 1, each off by 1e-16
V3 = dict(n_group=4, topk_group=2, routed_scaling_factor=2.5)
MOONLIGHT = dict(routed_scaling_factor=2.446)
V2 = dict(
    n_group=4, topk_group=2, routed_scaling_factor=16.0, norm_topk_prob=False,
    scoring_func="softmax", topk_method="group_limited_greedy",
)  # fmt: skip
V2_LITE = dict(norm_topk_prob=False, scoring_func="softmax", topk_method="greedy")
VARIANTS = {"v3": V3, "moonlight": MOONLIGHT, "v2": V2, "v2_lite": V2_LITE}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_close(got, want, tol=EXACT):
    assert got.shape == want.shape and got.dtype == want.dtype
    error = (got.double() - want.double()).abs().max().item() if got.numel() else 0.0
    assert error <= tol, f"error {error:.2e} > {tol:.0e}"


@pytest.fixture(params=["blocks", "one_block", "at_once"])
def path(request, monkeypatch):
    """The ways through the experts: the CPU's in blocks of 8 rows or of many; the seam's."""
    if request.param == "blocks":
        blocks = moe._ExpertsInBlocks.blocks
        few = staticmethod(lambda sizes: blocks(sizes, 8))
        monkeypatch.setattr(moe._ExpertsInBlocks, "blocks", few)
    return moe.grouped_gemm if request.param == "at_once" else None


def layer(D=20, I=12, E=16, K=4, shared=1, dtype=torch.float64, **router):
    """Its biases lie around −0.6: most biased scores are negative."""
    mixture = moe.MoE(D, I, E, K, shared, **router).to(dtype)
    if mixture.gate.e_score_correction_bias is not None:
        mixture.gate.e_score_correction_bias.copy_(0.1 * torch.randn(E) - 0.6)
    return mixture


def tokens(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def gradients(loss, mixture, x):
    parameters = dict(mixture.named_parameters())
    found = torch.autograd.grad(loss, [x, *parameters.values()])
    return dict(zip(["x", *parameters], found, strict=True))


def chosen(indices, E=16):
    return torch.zeros(len(indices), E).scatter(1, indices, 1.0)


# The layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(
    "B, T, E, K", [(1, 1, 16, 4), (2, 9, 16, 4), (3, 5, 8, 1), (1, 7, 8, 4)], ids=str
)
def test_layer_is_the_loops(path, variant, B, T, E, K):
    """Output, balance loss and every gradient."""
    mixture, x = layer(E=E, K=K, grouped_gemm=path, **VARIANTS[variant]), tokens(B, T, 20)
    got, (want, loss) = mixture(x), moe.moe_reference(mixture, x)
    assert_close(got, want)
    assert_close(mixture.balance_loss, loss)
    upstream = torch.randn_like(got)
    ours = gradients((got * upstream).sum() + 7 * mixture.balance_loss, mixture, x)
    theirs = gradients((want * upstream).sum() + 7 * loss, mixture, x)
    for name, gradient in theirs.items():
        assert_close(ours[name], gradient, 1e-11)  # sums over all tokens


def transformers_v3(D, I, E, K, shared, n_group, topk_group, scale, norm):
    hf = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = hf.DeepseekV3Config(
        hidden_size=D, moe_intermediate_size=I, n_routed_experts=E, num_experts_per_tok=K,
        n_shared_experts=shared, n_group=n_group, topk_group=topk_group,
        routed_scaling_factor=scale, norm_topk_prob=norm,
    )  # fmt: skip
    config._experts_implementation = "eager"
    return hf.DeepseekV3MoE(config).double()


def transformers_v2(D, I, E, K, shared, n_group, topk_group, scale, method):
    hf = pytest.importorskip("transformers.models.deepseek_v2.modeling_deepseek_v2")
    config = hf.DeepseekV2Config(
        hidden_size=D, moe_intermediate_size=I, num_experts_per_tok=K, n_shared_experts=shared,
        n_routed_experts=E, n_group=n_group, topk_group=topk_group, topk_method=method,
        routed_scaling_factor=scale, norm_topk_prob=False, num_attention_heads=4,
    )  # fmt: skip
    config._experts_implementation = "eager"
    return hf.DeepseekV2Moe(config).double()


def assert_same_as(theirs, mixture, tol):
    """Same weights in both; the choices, the output and every gradient."""
    missing, unexpected = theirs.load_state_dict(mixture.state_dict(), strict=True)
    assert not missing and not unexpected
    x = tokens(2, 33, 20)
    _, weights, indices = theirs.gate(x)
    ours = mixture.gate(x.flatten(0, 1))
    assert_close(chosen(ours[0]), chosen(indices), 0)
    spread = torch.zeros(66, 16, dtype=torch.float64)
    assert_close(
        spread.scatter(1, ours[0], ours[1]), spread.scatter(1, indices, weights.double()), tol
    )
    got, want = mixture(x), theirs(x)
    assert_close(got, want, tol)
    upstream = torch.randn_like(got)
    got_gradients = gradients((got * upstream).sum(), mixture, x)
    want_gradients = gradients((want * upstream).sum(), theirs, x)
    assert got_gradients.keys() == want_gradients.keys()
    for name, gradient in want_gradients.items():
        assert_close(got_gradients[name], gradient, 10 * tol)  # sums over 66 tokens


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "raw"])
@pytest.mark.parametrize("n_group, topk_group, shared", [(4, 2, 1), (8, 3, 2), (1, 1, 1)], ids=str)
def test_layer_is_transformers_deepseek_v3(path, n_group, topk_group, shared, norm):
    theirs = transformers_v3(20, 12, 16, 4, shared, n_group, topk_group, 2.5, norm)
    groups = dict(n_group=n_group, topk_group=topk_group)
    mixture = layer(
        shared=shared, routed_scaling_factor=2.5, norm_topk_prob=norm, grouped_gemm=path, **groups
    )
    # its router works in fp32 whatever the weights: 24 bits, on outputs of size 1
    assert_same_as(theirs, mixture, 1e-5)


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
@pytest.mark.parametrize("shared", [1, 2])
def test_layer_is_transformers_deepseek_v2(method, shared):
    theirs = transformers_v2(20, 12, 16, 4, shared, 4, 2, 3.0, method)
    router = V2 | dict(topk_method=method, routed_scaling_factor=3.0)
    assert_same_as(theirs, layer(shared=shared, **router), 1e-5)


def test_order_of_tokens_does_not_matter():
    mixture, x = layer(**V3), tokens(1, 50, 20)
    order = torch.randperm(50)
    assert_close(mixture(x[:, order]), mixture(x)[:, order])


def test_any_leading_axes(path):
    mixture, x = layer(grouped_gemm=path, **V3), tokens(2, 6, 20)
    want, loss = mixture(x), mixture.balance_loss
    assert_close(mixture(x.flatten(0, 1)), want.flatten(0, 1))  # one sequence of 12
    assert mixture.balance_loss.shape == ()
    assert_close(mixture(x.view(2, 1, 6, 20)), want.view(2, 1, 6, 20))
    assert_close(mixture.balance_loss, loss)
    assert mixture(x[:, :0]).shape == (2, 0, 20) and mixture.load.sum() == 0


def test_no_token_is_dropped(path):
    mixture, x = layer(E=16, K=2, grouped_gemm=path), tokens(4, 32, 20)
    mixture.gate.e_score_correction_bias[3:5] += 10
    got, (want, _) = mixture(x), moe.moe_reference(mixture, x)
    assert_close(got, want)
    assert mixture.load.tolist() == [128 if i in (3, 4) else 0 for i in range(16)]
    assert moe.max_violation(mixture.load) == 16 / 2 - 1


def test_seams_are_used():
    products, widths = [], []

    def spy(x, weight, sizes):
        products.append((tuple(weight.shape), int(sizes.sum())))
        return moe.grouped_gemm(x, weight, sizes)

    def linear(*args, bias):
        widths.append(args)
        return nn.Linear(*args, bias=bias)

    mixture = moe.MoE(20, 12, 16, 4, 2, linear=linear, grouped_gemm=spy)
    mixture(torch.randn(2, 3, 20))
    assert products == [((16, 24, 20), 24), ((16, 20, 12), 24)]
    assert widths == [(20, 24), (20, 24), (24, 20)]
    assert moe.MoE(20, 12, 16, 4, n_shared_experts=0).shared_experts is None


def test_state_has_the_released_names():
    state = {name: tuple(t.shape) for name, t in moe.MoE(20, 12, 16, 4, 2).state_dict().items()}
    assert state == {
        "gate.weight": (16, 20),
        "gate.e_score_correction_bias": (16,),
        "experts.gate_up_proj": (16, 24, 20),
        "experts.down_proj": (16, 20, 12),
        "shared_experts.gate_proj.weight": (24, 20),
        "shared_experts.up_proj.weight": (24, 20),
        "shared_experts.down_proj.weight": (20, 24),
    }
    assert "gate.e_score_correction_bias" not in layer(**V2).state_dict()


def test_swiglu_is_its_equation():
    mlp, x = moe.SwiGLU(6, 10).double(), tokens(3, 4, 6)
    gate, up, down = (p.weight for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    assert_close(mlp(x), F.linear(F.silu(x @ gate.T) * (x @ up.T), down))


# The router ---------------------------------------------------------------------------------


def misrouted(gate, dropped, x):
    indices, _, scores = gate(x)
    wrong = [moe.choose_reference(s, gate, dropped) for s in scores]
    return (chosen(torch.tensor(wrong)) != chosen(indices)).any(-1).double().mean().item()


def test_masking_with_0_would_be_caught():
    gate, x = layer(**V3).gate, tokens(400, 20)
    assert misrouted(gate, float("-inf"), x) == 0
    assert misrouted(gate, 0.0, x) > 0.1
    gate.e_score_correction_bias.copy_(torch.rand(16) + 2)  # as in the released V3: no difference
    assert misrouted(gate, 0.0, x) == 0


@pytest.mark.parametrize("options", [V3, MOONLIGHT], ids=["v3", "moonlight"])
def test_bias_changes_who_and_never_the_weights(options):
    gate, x = layer(**options).gate, tokens(300, 20)
    indices, weights, scores = gate(x)
    of_chosen = scores.gather(1, indices)
    want = options["routed_scaling_factor"] * of_chosen / of_chosen.sum(-1, keepdim=True)
    assert_close(weights, want)
    gate.e_score_correction_bias += 0.25  # of all alike: nobody's rank changes
    again = gate(x)
    assert_close(chosen(again[0]), chosen(indices), 0)
    gate.e_score_correction_bias.zero_()
    unbiased = gate(x)
    assert (chosen(unbiased[0]) != chosen(indices)).any()
    assert torch.equal(unbiased[2], scores)


@settings(max_examples=50, deadline=None)
@given(
    groups=st.sampled_from([(1, 1), (2, 1), (4, 2), (8, 3), (8, 8)]),
    K=st.integers(1, 4),
    method=st.sampled_from(["noaux_tc", "group_limited_greedy"]),
    scoring=st.sampled_from(["sigmoid", "softmax"]),
    seed=st.integers(0, 2**31),
)
def test_choice_is_legal_and_that_of_the_loops(groups, K, method, scoring, seed):
    G, kept = groups
    torch.manual_seed(seed)
    gate = layer(K=K, n_group=G, topk_group=kept, topk_method=method, scoring_func=scoring).gate
    indices, weights, scores = gate(torch.randn(10, 20, dtype=torch.float64))
    want = chosen(torch.tensor([moe.choose_reference(s, gate) for s in scores]))
    got = chosen(indices)
    assert torch.equal(got, want)
    assert (got.sum(-1) == K).all()
    assert (got.unflatten(-1, (G, -1)).amax(-1).sum(-1) <= kept).all()
    assert_close(weights.sum(-1), torch.ones(10, dtype=torch.float64))


@pytest.mark.parametrize("assign", [True, False])
def test_a_bf16_checkpoint_makes_no_bf16_bias(assign):
    router = moe.Router(20, 16, 4)
    state = {name: torch.randn_like(t).bfloat16() for name, t in router.state_dict().items()}
    router.load_state_dict(state, assign=assign)
    bias = router.e_score_correction_bias
    assert bias.dtype == torch.float32 and torch.equal(
        bias, state["e_score_correction_bias"].float()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_bias_stays_fp32(dtype):
    bias = torch.linspace(2, 2.001, 16)  # equal in bf16
    mixture = moe.MoE(20, 12, 16, 4)
    mixture.gate.e_score_correction_bias.copy_(bias)
    for narrow in (mixture.to(dtype), copy.deepcopy(mixture), mixture.bfloat16(), mixture.half()):
        kept = narrow.gate.e_score_correction_bias
        assert kept.dtype == torch.float32 and torch.equal(kept, bias)
        assert dict(narrow.gate.named_buffers())["e_score_correction_bias"] is kept
    x = torch.randn(2, 3, 20, dtype=torch.float16)
    assert mixture(x).dtype == torch.float16
    assert mixture.gate(x[0])[1].dtype == mixture.gate(x[0])[2].dtype == torch.float32
    mixture.load_state_dict(mixture.state_dict())
    assert torch.equal(mixture.gate.e_score_correction_bias, bias)


def test_bias_survives_the_meta_device():
    with torch.device("meta"):
        mixture = moe.MoE(20, 12, 16, 4)
    assert mixture.bfloat16().gate.e_score_correction_bias.dtype == torch.float32
    bias = mixture.to_empty(device="cpu").gate.e_score_correction_bias
    assert bias.dtype == torch.float32 and torch.equal(bias, torch.zeros(16))


def test_router_ignores_autocast():
    gate, x = layer(**V3, dtype=torch.float32).gate, tokens(200, 20, dtype=torch.float32)
    want = gate(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = gate(x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_v3_layer_has_the_published_size():
    with torch.device("meta"):
        mixture = moe.MoE(7168, 2048, 256, 8, n_group=8, topk_group=4)
    assert sum(t.numel() for t in mixture.state_dict().values()) == 11_320_164_608


# Balance ------------------------------------------------------------------------------------


def loads_in_closed_loop(sign, center=False, steps=300, E=16):
    gate = moe.Router(20, E, 4)
    x = torch.randn(512, 20) + 2 * torch.randn(20)
    loads = []
    for _ in range(steps):
        loads.append(gate(x)[0].flatten().bincount(minlength=E))
        gate.update_bias(loads[-1], sign * 0.003, center)
    return gate, loads


@pytest.mark.parametrize("center", [False, True], ids=["plain", "centred"])
def test_bias_evens_the_load_and_a_reversed_one_does_not(center):
    gate, loads = loads_in_closed_loop(1, center)
    first, last = moe.max_violation(loads[0]), moe.max_violation(loads[-1])
    assert first > 1 and last < 0.2
    assert not center or abs(gate.e_score_correction_bias.mean()) < 1e-6
    _, loads = loads_in_closed_loop(-1, center)
    assert moe.max_violation(loads[-1]) > first


def test_update_is_its_equation():
    gate = moe.Router(20, 4, 2)
    gate.update_bias(torch.tensor([10, 4, 2, 0]), 0.5)  # the mean is 4
    assert gate.e_score_correction_bias.tolist() == [-0.5, 0, 0.5, 0.5]
    gate.update_bias(torch.tensor([10, 4, 2, 0]), 0.5, center=True)  # Σ sign / 4 = 1/4
    assert gate.e_score_correction_bias.tolist() == [-1.125, -0.125, 0.875, 0.875]
    before = gate.e_score_correction_bias.clone()
    gate.update_bias(torch.tensor([2**30 + 1, 2**30, 2**30 - 1, 2**30]), 1.0)  # exact past fp32
    assert (gate.e_score_correction_bias - before).tolist() == [-1, 0, 1, 0]
    assert not gate.e_score_correction_bias.requires_grad


def test_forward_never_moves_the_bias_and_eval_has_no_loss():
    mixture, x = layer(**V3), tokens(2, 9, 20)
    before = copy.deepcopy(mixture.state_dict())
    want = mixture(x)
    want.sum().backward()
    assert mixture.balance_loss is not None
    load = mixture.load.clone()
    mixture.eval()
    assert_close(mixture(x), want, 0)
    assert mixture.balance_loss is None
    mixture(x[:1])
    assert mixture.load.sum() == 9 * 4 and load.sum() == 18 * 4
    for name, tensor in mixture.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_load_counts_the_chosen():
    mixture, x = layer(**V3), tokens(2, 9, 20)
    mixture(x)
    indices = mixture.gate(x.flatten(0, 1))[0]
    assert mixture.load.dtype == torch.int64
    assert mixture.load.tolist() == chosen(indices).sum(0).int().tolist()


def test_recomputation_counts_nothing_twice(path):
    mixture, x = layer(grouped_gemm=path, **V3), tokens(2, 9, 20)
    y = mixture(x)
    load, want_loss = mixture.load, mixture.balance_loss
    want = gradients(y.square().sum() + 7 * want_loss, mixture, x)
    again = checkpoint(mixture, x, use_reentrant=False)
    loss = mixture.balance_loss
    got = gradients(again.square().sum() + 7 * loss, mixture, x)
    assert_close(loss, want_loss)
    assert torch.equal(mixture.load, load)  # after backward has run forward a second time
    for name, gradient in want.items():
        assert_close(got[name], gradient)


def test_balance_loss_by_hand():
    """Two sequences of one token, 2 of 4 experts: f = 2 for the chosen, P = s / Σs."""
    scores = torch.tensor([[[0.1, 0.2, 0.3, 0.4]], [[0.4, 0.4, 0.4, 0.4]]], dtype=torch.float64)
    indices = torch.tensor([[[3, 2]], [[0, 1]]])
    want = (2 * (0.3 + 0.4) + 2 * (0.25 + 0.25)) / 2
    loss = moe.sequence_balance_loss(scores, indices)
    assert_close(loss, torch.tensor(want, dtype=torch.float64))
    # normalised per token: a token's scale does not count
    assert_close(moe.sequence_balance_loss(scores * 3, indices), loss)


@pytest.mark.parametrize("T", [1, 4, 16])
def test_balance_loss_is_1_when_even_and_E_over_K_when_collapsed(T):
    E, K = 8, 2
    even = torch.arange(T * K).view(1, T, K) % E
    scores = torch.full((1, T, E), 0.3, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    assert_close(moe.sequence_balance_loss(scores, even), one)
    only_two = torch.zeros(1, T, E, dtype=torch.float64)
    only_two[..., :2] = 1
    collapsed = torch.arange(2).expand(1, T, 2)
    assert_close(moe.sequence_balance_loss(only_two, collapsed), one * E / K)


def test_balance_loss_is_of_each_sequence():
    """Two sequences, each lopsided, together even: the loss must see the two."""
    scores = torch.full((2, 4, 4), 0.1, dtype=torch.float64)
    scores[0, :, :2] = scores[1, :, 2:] = 0.9
    indices = scores.topk(2).indices
    loss = moe.sequence_balance_loss(scores, indices)
    assert_close(loss, torch.tensor(1.8, dtype=torch.float64))
    flat = moe.sequence_balance_loss(scores.flatten(0, 1)[None], indices.flatten(0, 1)[None])
    assert_close(flat, torch.ones_like(flat))


def test_balance_loss_gradcheck():
    scores = torch.rand(2, 5, 6, dtype=torch.float64, requires_grad=True)
    indices = scores.topk(3).indices  # fixed: f has no gradient
    assert torch.autograd.gradcheck(lambda s: moe.sequence_balance_loss(s, indices), scores)


def test_descending_the_balance_loss_evens_the_load():
    mixture = layer(D=20, dtype=torch.float32)
    mixture.gate.e_score_correction_bias.zero_()
    x = torch.randn(1, 512, 20) + torch.randn(20)
    optimizer = torch.optim.SGD([mixture.gate.weight], lr=0.5)
    violations = []
    for _ in range(60):
        mixture(x)
        violations.append(moe.max_violation(mixture.load))
        (gradient,) = torch.autograd.grad(mixture.balance_loss, mixture.gate.weight)
        mixture.gate.weight.grad = gradient
        optimizer.step()
    assert violations[0] > 1 and violations[-1] < violations[0] / 2


def test_max_violation_by_hand():
    got = moe.max_violation(torch.tensor([[4, 2, 0, 2], [5, 5, 5, 5]]))
    assert_close(got, torch.tensor([1.0, 0.0]), 0)
    assert moe.max_violation(torch.tensor([1, 0, 0, 0])) == 3  # one token, fewer than experts
    assert moe.max_violation(torch.zeros(4)).isnan()


# Dispatch and the grouped product -----------------------------------------------------------


def one_by_one(x, weight, sizes):
    parts = x.split(sizes.tolist())
    return torch.cat([rows @ w.T for rows, w in zip(parts, weight, strict=True)])


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 40), min_size=1, max_size=9),
    A=st.integers(1, 9),
    B=st.integers(1, 9),
)
def test_grouped_gemm_is_one_product_an_expert(sizes, A, B):
    """Forward and gradients; experts without rows are among them."""
    sizes = torch.tensor(sizes)
    x, weight = tokens(int(sizes.sum()), A), tokens(len(sizes), B, A)
    got, want = moe.grouped_gemm(x, weight, sizes), one_by_one(x, weight, sizes)
    assert_close(got, want)
    upstream = torch.randn_like(want)
    ours = torch.autograd.grad(got, (x, weight), upstream)
    theirs = torch.autograd.grad(want, (x, weight), upstream)
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other)


def test_grouped_gemm_gradcheck():
    sizes = torch.tensor([2, 0, 3])
    x, weight = tokens(5, 3), tokens(3, 4, 3)
    assert torch.autograd.gradcheck(lambda *t: moe.grouped_gemm(*t, sizes), (x, weight))


def test_grouped_gemm_under_autocast_is_linear_under_autocast():
    sizes = torch.tensor([7, 0, 30])
    x, weight = tokens(37, 16, dtype=torch.float32), tokens(3, 8, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        got = moe.grouped_gemm(x, weight, sizes)
        parts = zip(x.split(sizes.tolist()), weight, strict=True)
        want = torch.cat([F.linear(rows, w) for rows, w in parts])
    assert_close(got, want, 2**-6)  # one step of bf16 at 4: the order of the sum may differ
    upstream = torch.randn_like(got)
    ours = torch.autograd.grad(got, (x, weight), upstream)
    theirs = torch.autograd.grad(want, (x, weight), upstream)
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine, other, 2**-5)


@pytest.mark.parametrize("N", [128, 1056], ids=["16", "64"])
@pytest.mark.parametrize("skew", [0.0, 2.0], ids=["even", "skewed"])
def test_filled_up_rows_of_bf16_change_nothing(path, skew, N):
    """The whole batch (rows filled up) = its tokens a few at a time (rows as they are)."""
    mixture = layer(D=32, E=16, K=4, dtype=torch.bfloat16, grouped_gemm=path)
    mixture.gate.e_score_correction_bias[:5] += skew
    exact, x = copy.deepcopy(mixture).double(), torch.randn(N, 32).bfloat16()
    x[0] = 100.0  # the token that a filled-up row repeats
    dtypes = torch.bfloat16, torch.bfloat16, torch.float64
    whole, few, wide = (x.to(dtype).requires_grad_() for dtype in dtypes)
    got, want = mixture(whole), torch.cat([mixture(part) for part in few.split(32)])
    assert_close(got, want, 2**-2)  # a step of bf16 at the 60 that token 0 reaches
    assert (got - want)[1:].abs().max() <= 2**-6
    upstream = torch.randn_like(got)
    ours = gradients((got * upstream).sum(), mixture, whole)
    theirs = gradients((want * upstream).sum(), mixture, few)
    for name, gradient in gradients((exact(wide) * upstream).sum(), exact, wide).items():
        error, unfilled = ((g[name].double() - gradient).norm() for g in (ours, theirs))
        assert unfilled < 0.03 * gradient.norm(), name  # a dozen roundings of 2^-9
        assert error < 1.2 * unfilled + 1e-3 * gradient.norm(), name


@pytest.mark.parametrize("N, unit", [(64, 1), (128, 16), (1023, 16), (1024, 64)])
def test_rows_are_filled_up_where_it_pays(N, unit):
    sizes = []

    def spy(rows, weight, counts):
        sizes.append(counts)
        return moe.grouped_gemm(rows, weight, counts)

    layer(dtype=torch.bfloat16, grouped_gemm=spy)(torch.randn(N, 20).bfloat16())
    for counts in sizes:
        assert [(counts % u == 0).all().item() for u in (16, 64)] == [unit >= 16, unit == 64]
        assert (counts.sum() > N * 4) == (unit > 1)


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 20), min_size=1, max_size=12), rows=st.integers(1, 40))
def test_blocks_are_all_experts_once(sizes, rows):
    experts, covered = [], []
    for e, r in moe._ExpertsInBlocks.blocks(sizes, rows):
        experts += range(len(sizes))[e]
        covered += range(sum(sizes))[r]
        assert r.stop - r.start == sum(sizes[e])
        assert e.stop == len(sizes) or sum(sizes[e][:-1]) < rows <= sum(sizes[e])
    assert experts == list(range(len(sizes))) and covered == list(range(sum(sizes)))


@pytest.mark.parametrize("E, K", [(4, 2), (6, 1)])
def test_experts_gradcheck(path, E, K):
    experts = moe.Experts(E, 3, 2, path).double()
    x, weights = tokens(5, 3), torch.rand(5, K, dtype=torch.float64, requires_grad=True)
    indices = torch.rand(5, E).topk(K).indices
    load = indices.flatten().bincount(minlength=E)
    stacks = experts.gate_up_proj, experts.down_proj

    def call(x, weights, *stacks):
        named = dict(zip(("gate_up_proj", "down_proj"), stacks, strict=True))
        return functional_call(experts, named, (x, indices, weights, load))

    assert torch.autograd.gradcheck(call, (x, weights, *stacks))


def test_autocast_is_near_float64(path):
    mixture, x = (
        layer(D=32, grouped_gemm=path, **V3, dtype=torch.float32),
        tokens(2, 100, 32, dtype=torch.float32),
    )
    exact = copy.deepcopy(mixture).double()
    x2 = x.detach().double().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        got, alone = mixture(x), exact(x2)
    want = exact(x2)
    assert torch.equal(alone, want)  # float64 is left alone, as by nn.Linear
    assert got.dtype == torch.bfloat16 and mixture.balance_loss.dtype == torch.float32
    assert (got.double() - want).norm() / want.norm() < 0.02
    upstream = torch.randn_like(want)
    ours = gradients((got * upstream).sum() + mixture.balance_loss, mixture, x)
    for name, gradient in gradients(
        (want * upstream).sum() + exact.balance_loss, exact, x2
    ).items():
        assert ours[name].dtype == torch.float32
        assert (ours[name].double() - gradient).norm() / gradient.norm() < 0.02, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_is_the_cpu(dtype):
    mixture, x = layer(D=32, **V3, dtype=torch.float32), torch.randn(4, 100, 32)
    want = mixture(x)
    mixture.cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        got = mixture(x.cuda()).cpu()
    # a near tie may fall another way on another device: most tokens, not all
    close = (got - want).norm(dim=-1) / want.norm(dim=-1) < 0.02
    assert close.double().mean() > 0.98


# Bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_experts_per_tok=17), "17 experts from 1 of 1"),
        (dict(num_experts_per_tok=0), "0 experts"),
        (dict(n_group=3), "16 experts.*3 groups"),
        (dict(n_group=0), "0 groups"),
        (dict(n_group=4, topk_group=5), "5 of 4"),
        (dict(n_group=4, topk_group=0), "0 of 4"),
        (dict(n_group=8, topk_group=1), "4 experts from 1 of 8"),
        (dict(n_group=16, topk_group=8), "16"),
        (dict(scoring_func="tanh"), "tanh"),
        (dict(topk_method="noaux"), "noaux"),
    ],
    ids=str,
)
def test_router_refuses(options, message):
    sizes = dict(hidden_size=20, n_routed_experts=16, num_experts_per_tok=4)
    with pytest.raises(ValueError, match=message):
        moe.Router(**sizes | options)


def test_greedy_has_no_groups():
    gate = moe.Router(20, 16, 4, n_group=8, topk_group=1, topk_method="greedy")
    assert gate(torch.randn(3, 20))[0].shape == (3, 4)


@pytest.mark.parametrize(
    "x, weight, sizes, message",
    [
        ((5, 3), (2, 4, 3), [2, 2], "summing to 4"),
        ((5, 3), (2, 4, 3), [5], r"\(1,\)"),
        ((5, 3), (2, 4, 3), [6, -1], "summing to 5"),
        ((5, 3), (2, 3, 4), [2, 3], r"\(2, 3, 4\)"),
        ((1, 5, 3), (2, 4, 3), [2, 3], r"\(1, 5, 3\)"),
        ((5, 3), (4, 3), [2, 3, 0, 0], r"\(4, 3\)"),
    ],
    ids=str,
)
def test_grouped_gemm_refuses(x, weight, sizes, message):
    with pytest.raises(ValueError, match=message):
        moe.grouped_gemm(torch.randn(x), torch.randn(weight), torch.tensor(sizes))


def test_a_layer_is_copied_behind_a_training_step():
    layer, x = moe.MoE(8, 6, 4, 2), torch.randn(1, 5, 8)
    y = layer(x)
    other = copy.deepcopy(layer)
    assert other.balance_loss is None and layer.balance_loss.requires_grad
    assert torch.equal(other(x), y)


def test_grouped_gemm_wants_both_routes_and_takes_no_experts():
    x, weight, sizes = torch.randn(5, 3), torch.randn(2, 4, 3), torch.tensor([2, 3])
    with pytest.raises(ValueError, match="one without the other"):
        moe.grouped_gemm(x, weight, sizes, (torch.arange(5), None))
    assert moe.grouped_gemm(x[:0], weight[:0], sizes[:0]).shape == (0, 4)


def test_update_bias_refuses():
    with pytest.raises(ValueError, match=r"16 experts.*\(15,\)"):
        moe.Router(20, 16, 4).update_bias(torch.ones(15), 0.1)
    with pytest.raises(ValueError, match="greedy has no bias"):
        moe.Router(20, 16, 4, topk_method="greedy").update_bias(torch.ones(16), 0.1)


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_a_few_tokens_ask_their_own_experts_alone(tokens, dtype, tol, monkeypatch):
    """Without gradients; the way by sorted rows stays the answer to compare with."""
    layer = moe.MoE(32, 24, 16, 4).to(dtype)
    x = torch.randn(1, tokens, 32, dtype=dtype)
    want, asked = layer(x).detach(), []
    few = layer.experts.of_few
    monkeypatch.setattr(layer.experts, "of_few", lambda *a: asked.append(1) or few(*a))
    with torch.no_grad():
        got = layer(x)
        layer(torch.randn(1, 4, 32, dtype=dtype))  # 16 pairs: as many as experts
    assert len(asked) == 1
    assert (got - want).abs().max() <= tol * want.abs().max()


@pytest.mark.parametrize("tokens", [1, 2, 8])
def test_a_few_tokens_are_compiled_whole(tokens):
    """fullgraph: nothing in it waits for the choice; up to two pairs an expert."""
    layer = moe.MoE(32, 24, 16, 4).eval()
    x = torch.randn(1, tokens, 32)
    want = layer(x).detach()
    with torch.no_grad():
        got = torch.compile(layer, dynamic=True, fullgraph=True, backend="eager")(x)
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()


def test_compiled_gradients_are_the_eager_ones():
    """torch 2.11 compiled a Function to a gradient of 0 if its forward ended in place."""
    layer, x = moe.MoE(32, 24, 8, 2), torch.randn(1, 9, 32, requires_grad=True)
    inputs = [x, *layer.parameters()]
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="eager")
    want, got = (torch.autograd.grad((f(x) ** 2).sum(), inputs) for f in (layer, compiled))
    for mine, other in zip(got, want, strict=True):
        assert other.abs().max() > 0 and (mine - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_no_tokens_are_no_trouble(shape, training):
    layer = moe.MoE(32, 24, 16, 4).train(training)
    for grad in True, False:
        with torch.set_grad_enabled(grad):
            assert layer(torch.randn(*shape, 32)).shape == (*shape, 32)
            assert not layer.load.any()
    if training:
        assert layer.balance_loss == 0


def test_a_token_alone_takes_the_product_that_was_given():
    asked = []

    def product(x, weight, sizes):
        asked.append(len(x))
        return moe.grouped_gemm(x, weight, sizes)

    layer = moe.MoE(32, 24, 16, 4, grouped_gemm=product)
    with torch.no_grad():
        layer(torch.randn(1, 1, 32))
    assert asked == [4, 4]


@pytest.mark.parametrize("given", [None, moe.grouped_gemm])
def test_frozen_experts_cost_no_gradient(given):
    """Of 3 products (forward, rows, weights) the third; what lies before them learns as ever."""
    from torch.utils.flop_counter import FlopCounterMode

    layer, flops = moe.MoE(32, 24, 4, 2, 0, grouped_gemm=given), []
    x, found = torch.randn(1, 50, 32, requires_grad=True), []
    for trained in True, False:
        layer.experts.requires_grad_(trained)
        with FlopCounterMode(display=False) as counter:
            y = layer(x)
            before = counter.get_total_flops()
            y.sum().backward()
        flops.append(counter.get_total_flops() - before)
        found.append([t.grad.clone() for t in (x, layer.gate.weight)])
        assert (layer.experts.down_proj.grad is None) is not trained
        layer.zero_grad()
        x.grad = None
    for mine, theirs in zip(*found, strict=True):
        assert torch.equal(mine, theirs)
    products = 2 * 50 * 2 * 3 * 32 * 24
    assert flops[0] - flops[1] == products


def test_a_second_derivative_is_refused():
    layer = moe.MoE(32, 24, 4, 2)
    x = torch.randn(1, 5, 32, requires_grad=True)
    for loss in (torch.sum, lambda y: y.square().sum()):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss(layer(x)), [x], create_graph=True)
    weight = torch.randn(2, 4, 3)
    grouped = lambda x: moe.grouped_gemm(x, weight, torch.tensor([2, 3])).sum()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.functional.hessian(grouped, torch.randn(5, 3))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_a_load_of_narrow_integers_moves_the_bias_the_right_way(dtype):
    router = moe.Router(8, 256, 2)
    load = torch.ones(256, dtype=dtype)
    load[0] = {1: 200, 2: 20_000}.get(dtype.itemsize, 9_000_000)
    router.update_bias(load, 0.5)
    assert router.e_score_correction_bias[0] == -0.5 and router.e_score_correction_bias[1] == 0.5


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("rows", [1, 2, 7, 32])
@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_few_rows_are_those_of_a_linear_layer(rows, dtype, tol, amx, monkeypatch):
    """Also where the rows are a part of wider ones, and the weight one of a stack."""
    wide, stack = torch.randn(rows, 80).to(dtype), torch.randn(3, 24, 40).to(dtype)
    x, weight = wide[:, 20:60], stack[1]
    want = x.double() @ weight.double().T
    linear, asked = F.linear, []
    monkeypatch.setattr(F, "linear", lambda *a: asked.append(1) or linear(*a))
    got = moe.few_rows(x, weight, amx)
    assert len(asked) == (dtype == torch.float32 or not amx)
    assert got.dtype == dtype and got.shape == want.shape
    assert (got - want).abs().max() <= tol * want.abs().max()


# The kernels ---------------------------------------------------------------------------------

TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
GLUON = pytest.mark.skipif(moe.triton is None, reason="no Triton here")  # every one from 3.6 has it
INTERPRETED = """
import random
from importlib import import_module
import torch
moe = import_module("03_moe_router")
torch.manual_seed(0)
random.seed(0)


def operands(sizes, A, B, dtype, tokens=0):
    sizes, M = torch.tensor(sizes), sum(sizes)
    x, weight = torch.randn(tokens or M, A).to(dtype), torch.randn(len(sizes), B, A).to(dtype)
    source = torch.randint(tokens, (M,)) if tokens else None
    ends = sizes.cumsum(0).to(torch.int32)
    return sizes, x, weight, source, ends


def compare(sizes, A, B, dtype=torch.float32, tokens=0, every=False):
    "Forward, dgrad, wgrad, by each configuration that may run, against products in float64."
    sizes, x, weight, source, ends = operands(sizes, A, B, dtype, tokens)
    grad = torch.randn(int(sizes.sum()), B).to(dtype)
    rows = (x if source is None else x[source]).double().requires_grad_()
    wide = weight.double().requires_grad_()
    parts = zip(rows.split(sizes.tolist()), wide, strict=True)
    want = torch.cat([part @ w.T for part, w in parts])
    d_rows, d_weight = torch.autograd.grad(want, (rows, wide), grad.double())
    for which, turned, given, truth in (
        ("rows", False, (x, weight, source), want),
        ("rows", True, (grad, weight, None), d_rows),
        ("weights", False, (grad, x, source), d_weight),
    ):
        launches = moe.grouped_launches(which, given, torch.float32, ends, turned)
        assert launches
        for launch in launches if every else launches[-1:]:
            got = launch()
            tol = 1e-5 if dtype == torch.float32 else 1e-4
            error = (got.double() - truth).abs().max() if got.numel() else 0.0
            assert got.shape == truth.shape and error <= tol, (which, turned, error, sizes, A, B)
"""
CASES = {
    "shapes": """
compare([5, 0, 7], 16, 24)
compare([0, 0, 33, 1, 0], 40, 17, tokens=9)
compare([1], 1, 1)
compare([0, 0], 8, 8)
compare([70, 3], 33, 65, tokens=50)
for _ in range(6):
    sizes = [random.choice([0, 0, 1, random.randint(1, 40)]) for _ in range(random.randint(1, 7))]
    tokens = random.randint(1, 30) if random.random() < 0.5 else 0
    compare(sizes, random.randint(1, 50), random.randint(1, 50), tokens=tokens)
""",
    "every_config": """
# the tiles that GPUs run, forced onto the interpreter: fp16, for its products of bf16 are wrong
real = moe.grouped_configs
moe.HAS_GLUON = False  # it has no interpreter
for capability in (8, 0), (8, 6), (9, 0), (10, 0), (12, 0):
    moe.grouped_configs = lambda which, size, _: real(which, size, capability)
    compare([100, 0, 30, 130], 128, 136, torch.float16, every=True)
    compare([3, 90, 0], 128, 136, torch.float16, tokens=40, every=True)
compare([70, 0, 3], 33, 65, tokens=50, every=True)
moe.grouped_configs = lambda which, size, _: real(which, size, (9, 0))
compare([0, 0], 128, 136, torch.float16, every=True)  # no rows: no descriptor of them
""",
    "swiglu": """
# beside float64, gradients too; combine beside embedding_bag
from torch.nn import functional as F
moe.has_kernels = lambda x: True
for P, I in (7, 5), (3, 64), (1, 1):
    gate_up, w = torch.randn(P, 2 * I, requires_grad=True), torch.rand(P, requires_grad=True)
    got, upstream = moe.weighted_swiglu(gate_up, w), torch.randn(P, I)
    gate, up = gate_up.double().chunk(2, -1)
    want = F.silu(gate) * up * w.double()[:, None]
    mine = torch.autograd.grad(got, (gate_up, w), upstream)
    exact = torch.autograd.grad(want, (gate_up, w), upstream.double())
    for a, b in zip((got, *mine), (want, *exact), strict=True):
        assert (a - b).abs().max() <= 1e-5
    rows, rows_of_token = torch.randn(9, 1030 * I), torch.randint(9, (P, 3))
    want = F.embedding_bag(rows_of_token, rows, mode="sum")
    assert (moe.combine(rows, rows_of_token) - want).abs().max() <= 1e-6
""",
    "few": """
# a token or a few, as a GPU decodes: beside float64; a row has the same bits alone
moe.has_kernels, moe.FEW = lambda x: True, (8, 256, 2)  # fewer programs: each takes its time here
for N, K, E, D, I in (1, 1, 3, 7, 5), (2, 3, 4, 520, 9), (3, 2, 4, 33, 13):
    for dtype, tol in (torch.float32, 1e-6), (torch.bfloat16, 1e-2):
        experts, x = moe.Experts(E, D, I).to(dtype), torch.randn(N, D).to(dtype)
        indices, w = torch.rand(N, E).topk(K).indices, torch.rand(N, K)
        with torch.no_grad():
            got = experts.of_few_on_gpu(x, indices, w)
            alone = experts.of_few_on_gpu(x[-1:], indices[-1:], w[-1:])
        want = torch.zeros(N, D, dtype=torch.float64)
        for n in range(N):
            for k, e in enumerate(indices[n].tolist()):
                gate, up = (experts.gate_up_proj[e].double() @ x[n].double()).chunk(2)
                hidden = gate * gate.sigmoid() * up * w[n, k]
                want[n] += experts.down_proj[e].double() @ hidden
        assert got.dtype == dtype and (got - want).abs().max() <= tol * want.abs().max()
        assert torch.equal(got[-1:], alone)
        rows, weight = torch.randn(N, 2 * D)[:, D:].to(dtype), experts.down_proj[-1].mT
        got, want = moe.few_rows(rows, weight), rows.double() @ weight.double().T
        assert got.dtype == dtype and (got - want).abs().max() <= tol * want.abs().max()
        assert torch.equal(got[-1:], moe.few_rows(rows[-1:], weight))
""",
    "layer": """
# the autograd function, and a whole layer, as a GPU runs them: the same gradients as on a CPU
moe.has_kernels = lambda x: True
torch.manual_seed(3)
layer, x = moe.MoE(32, 16, 8, 3), torch.randn(2, 9, 32)
upstream = torch.randn(2, 9, 32)
runs = []
for product in None, moe.grouped_gemm, moe.grouped_gemm:
    layer.experts.grouped_gemm = product  # the CPU's blocks; then kernels, twice
    x_in = x.clone().requires_grad_()
    out = layer(x_in)
    runs.append([out, *torch.autograd.grad(out, (x_in, *layer.parameters()), upstream)])
for mine, other, again in zip(runs[1], runs[0], runs[2], strict=True):
    assert (mine - other).abs().max() <= 2e-5
    assert torch.equal(mine, again)  # in one order: the same bits
""",
}


@TRITON
@pytest.mark.parametrize("case", CASES)
def test_grouped_kernels_in_the_interpreter(case):
    interpret(INTERPRETED + CASES[case])


TENSOR_CORE = {80: "mma.sync", 86: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
KINDS = [("rows", False, False), ("rows", True, False), ("rows", False, True)]
KINDS += [("weights", False, False), ("weights", False, True)]


SHIPPED = [
    pytest.param(capability, *kind, marks=[pytest.mark.slow] * (capability in (86, 100, 120)))
    for capability in TENSOR_CORE
    for kind in KINDS
]


@TRITON
@pytest.mark.parametrize("capability, which, turned, gather", SHIPPED)
def test_grouped_compiles_without_a_spill(capability, which, turned, gather):
    for config in moe.grouped_configs(which, 2, divmod(capability, 10)):
        got = compile_grouped(moe, capability, which, config, turned=turned, gather=gather)
        assert got.spilled == 0 and got.shared <= 1024 * SHARED_LIMIT[capability]
        assert TENSOR_CORE[capability] in got.ptx
        if config[-1] != "pointers":  # weights, and x that is not gathered, by TMA
            assert "UTMALDG" in got.sass
        if config[-1] == "Gluon":  # the groups of warps take registers from each other
            assert "USETMAXREG" in got.sass
            continue
        each = 2 if which == "rows" and config[0][0] * config[0][1] <= 128 * 64 else 1
        assert each * got.shared <= 1024 * SHARED_LIMIT[capability]
        assert each * got.registers * 32 * config[1] <= 2**16


@TRITON
@pytest.mark.parametrize("kind", ["fp32", "bf16"])
@pytest.mark.parametrize("capability", TENSOR_CORE)
def test_swiglu_and_combine_compile_without_a_spill(capability, kind):
    for got in (
        compile_swiglu(moe, capability, kind) | compile_few(moe, capability, kind)
    ).values():
        assert got.spilled == 0


@TRITON
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fp32", "fp16"])
@pytest.mark.parametrize("capability", TENSOR_CORE)
def test_grouped_compiles_in_other_widths(capability, kind):
    for which, turned, gather in KINDS:
        width = 4 if kind == "fp32" else 2
        for config in moe.grouped_configs(which, width, divmod(capability, 10)):
            got = compile_grouped(moe, capability, which, config, kind, turned, gather)
            assert got.spilled == 0 and got.shared <= 1024 * SHARED_LIMIT[capability]


@GLUON
def test_gradients_in_fp32_have_a_stage_more():
    """Under autocast: those of fp32 weights, stored without a buffer."""
    got = compile_grouped_hopper(moe, "weights", 3, out="fp32")
    assert got.spilled == 0 and got.shared <= 1024 * SHARED_LIMIT[90]


@GLUON
def test_gluon_where_it_fits(monkeypatch):
    """Its weights' gradients end in whole boxes of 64 rows, or would reach the next expert's."""
    real = moe.grouped_configs
    monkeypatch.setattr(moe, "grouped_configs", lambda which, size, _: real(which, size, (9, 0)))
    ends = torch.tensor([5, 9], dtype=torch.int32)
    for N, fits in (128, True), (136, False):
        x, grad, weight = (
            torch.zeros(s, dtype=torch.bfloat16) for s in ((9, 64), (9, N), (2, N, 64))
        )
        by = {
            which: [run.args[-1] for run in moe.grouped_launches(which, ab, x.dtype, ends)]
            for which, ab in (("rows", (x, weight, None)), ("weights", (grad, x, None)))
        }
        assert by["rows"][0] == "Gluon" and ("Gluon" in by["weights"]) == fits


GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
TOL = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}
DTYPES = pytest.mark.parametrize("dtype", TOL, ids=str)


@pytest.mark.gpu
@GPU
@DTYPES
@pytest.mark.parametrize("D, I", [(2048, 1408), (300, 130)])
def test_grouped_gemm_on_a_gpu(D, I, dtype):
    sizes = torch.tensor([0, 700, 1, 0, 129, 64], device="cuda")
    place = {"device": "cuda", "dtype": dtype, "requires_grad": True}
    x, weight = torch.randn(894, D, **place), torch.randn(6, I, D, **place)
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    got, want = moe.grouped_gemm(x, weight, sizes), one_by_one(*wide, sizes)
    upstream = torch.randn_like(got)
    ours = got, *torch.autograd.grad(got, (x, weight), upstream)
    theirs = want, *torch.autograd.grad(want, wide, upstream.double())
    for a, b in zip(ours, theirs, strict=True):
        assert (a.double() - b).abs().max() <= TOL[dtype] * b.abs().max()


# many small ones, none at all, a last tile of few columns, more tiles than an H200 has SMs
SIZES = [[0, 700, 1, 0, 129, 64], [0, 0, 5], [1, 2, 3, 63, 65, 127, 0], [3000, 0, 2000, 64]]


@pytest.mark.gpu
@GPU
@DTYPES
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("D, I", [(256, 192), (64, 8), (1408, 2048), (128, 320)])
def test_every_configuration_on_a_gpu(D, I, sizes, dtype):
    """All that `grouped_product` chooses from, gathered and not, at shapes that fill no tile."""
    sizes = torch.tensor(sizes, device="cuda")
    make = functools.partial(torch.randn, device="cuda", dtype=dtype)
    M, ends = int(sizes.sum()), sizes.cumsum(0).to(torch.int32)
    x, few, weight, grad = make(M, D), make(100, D), make(len(sizes), I, D), make(M, I)
    source = torch.randint(100, (M,), device="cuda")
    for source_of, rows in (None, x), (source, few[source]):
        wide = [t.double().requires_grad_() for t in (rows, weight)]
        want = one_by_one(*wide, sizes)
        d_rows, d_weight = torch.autograd.grad(want, wide, grad.double())
        given = x if source_of is None else few
        for which, turned, operands, truth in (
            ("rows", False, (given, weight, source_of), want),
            ("rows", True, (grad, weight, None), d_rows),
            ("weights", False, (grad, given, source_of), d_weight),
        ):
            for out_dtype in {dtype, torch.float32} if which == "weights" else [dtype]:
                for launch in moe.grouped_launches(which, operands, out_dtype, ends, turned):
                    error = (launch().double() - truth).abs().max()
                    assert error <= TOL[dtype] * truth.abs().max(), (which, turned, launch.args)


@pytest.mark.gpu
@GPU
@DTYPES
@pytest.mark.parametrize("N", [1, 2, 8])
def test_a_few_tokens_on_a_gpu(N, dtype, monkeypatch):
    """Without gradients by other kernels than with them; a token has the same bits alone."""
    mixture = layer(D=600, I=130, dtype=torch.float32).cuda().to(dtype).eval()
    x = torch.randn(1, N, 600, device="cuda", dtype=dtype)
    want = mixture(x).detach()
    asked, few = [], moe.Experts.of_few_on_gpu
    monkeypatch.setattr(moe.Experts, "of_few_on_gpu", lambda *a: asked.append(1) or few(*a))
    with torch.no_grad():
        got, (indices, weights, _) = mixture(x), mixture.gate(x[0])
        together = mixture.experts(x[0], indices, weights, mixture.load)
        alone = mixture.experts(x[0, -1:], indices[-1:], weights[-1:], mixture.load)
    assert len(asked) == 3 and torch.equal(together[-1:], alone)
    assert (got - want).abs().max() <= 2 * TOL[dtype] * want.abs().max()
    weight = torch.randn(130, 600, device="cuda").to(dtype)
    got, want = moe.few_rows(x[0], weight), x[0].double() @ weight.double().T
    assert (got - want).abs().max() <= TOL[dtype] * want.abs().max()


@pytest.mark.gpu
@GPU
@DTYPES
def test_a_layer_on_a_gpu(dtype):
    """Gathered rows and all, beside the same layer in float64, which no kernel serves."""
    mixture = layer(D=256, I=128, dtype=torch.float64).cuda()
    narrow = copy.deepcopy(mixture).to(dtype)
    for mine, wide in zip(narrow.parameters(), mixture.parameters(), strict=True):
        wide.data.copy_(mine)
    x = torch.randn(4, 100, 256, device="cuda", dtype=dtype, requires_grad=True)
    x_wide = x.detach().double().requires_grad_()
    got, want = narrow(x), mixture(x_wide)
    upstream = torch.randn_like(got)
    ours = got, *gradients((got * upstream).sum(), narrow, x).values()
    theirs = want, *gradients((want * upstream.double()).sum(), mixture, x_wide).values()
    for a, b in zip(ours, theirs, strict=True):
        assert (a.double() - b).abs().max() <= 2 * TOL[dtype] * b.abs().max()
