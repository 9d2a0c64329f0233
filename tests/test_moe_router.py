"""03_moe_router.py against loops, transformers, and what routing must never do."""

import copy
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

moe = import_module("03_moe_router")

EXACT = 1e-12  # float64: sums of at most a few hundred terms of size 1, each off by 1e-16
V3 = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
SOFTMAX = {"norm_topk_prob": False, "scoring_func": "softmax"}
LITE = {**SOFTMAX, "topk_method": "greedy"}
V2 = {**V3, **SOFTMAX, "routed_scaling_factor": 16.0, "topk_method": "group_limited_greedy"}
RULES = {
    "v3": V3,
    "v3_one_group": {"routed_scaling_factor": 2.5},
    "v3_unnormed": {**V3, "norm_topk_prob": False},
    "v2": V2,
    "v2_lite": LITE,
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_close(got, want, tol=EXACT):
    assert got.shape == want.shape and got.dtype == want.dtype
    error = max((got.double() - want.double()).abs().flatten().tolist(), default=0.0)
    assert error <= tol, f"error {error:.2e} > {tol:.0e}"


def layer(shared=1, bias=-0.5, **rule):
    """In float64: 16 experts of 24, top-4, width 32; with the bias most choices fall below zero."""
    made = moe.MoE(32, 24, 16, 4, shared, **rule).double()
    if made.gate.e_score_correction_bias is not None:
        made.gate.e_score_correction_bias.normal_(bias, 0.3)
    return made


# The router ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("shared", [1, 2])
def test_layer_is_its_equations(rule, shared):
    made, x = layer(shared, **rule), torch.randn(2, 30, 32, dtype=torch.float64)
    y, loss = moe.moe_reference(made, x)
    assert_close(made(x), y, 20 * EXACT)  # outputs of about 20
    assert_close(made.balance_loss, loss)


@pytest.mark.parametrize("bias", [-3.0, -0.5, 0.0, 3.0])
@pytest.mark.parametrize("groups, kept", [(1, 1), (4, 1), (4, 2), (4, 3), (8, 4), (2, 1)])
def test_router_is_transformers(groups, kept, bias):
    hf = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = hf.DeepseekV3Config(
        hidden_size=32,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_group=groups,
        topk_group=kept,
        routed_scaling_factor=2.5,
    )
    theirs = hf.DeepseekV3TopkRouter(config)
    ours = moe.Router(32, 16, 4, groups, kept, 2.5)
    ours.e_score_correction_bias.normal_(mean=bias, std=0.3)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(500, 32)
    indices, weights, _ = ours(x)
    _, their_weights, their_indices = theirs(x)
    order, their_order = indices.argsort(-1), their_indices.argsort(-1)
    assert torch.equal(indices.gather(1, order), their_indices.gather(1, their_order))
    assert_close(weights.gather(1, order), their_weights.gather(1, their_order), 1e-6)  # fp32


@pytest.mark.parametrize("kind", ["eager", "grouped_mm"])
@pytest.mark.parametrize("shared", [1, 2])
def test_layer_is_transformers(shared, kind):
    """Output and every gradient, groups on and the biases negative."""
    hf = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    config = hf.DeepseekV3Config(
        hidden_size=32,
        moe_intermediate_size=24,
        n_routed_experts=16,
        num_experts_per_tok=4,
        n_shared_experts=shared,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
    )
    config._experts_implementation = kind
    theirs, ours = hf.DeepseekV3MoE(config), layer(shared, **V3).float()
    theirs.load_state_dict(ours.state_dict())  # the same names, stacked alike
    x = torch.randn(2, 40, 32, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    got, want = ours(x), theirs(x2)
    assert_close(got, want, 1e-4)  # fp32, outputs of about 20
    upstream = torch.randn_like(got)
    got.backward(upstream)
    want.backward(upstream)
    assert_close(x.grad, x2.grad, 1e-3)  # sums of 100 such products
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, theirs.get_parameter(name).grad, 1e-3)


def test_v2_layer_is_transformers():
    hf = pytest.importorskip("transformers.models.deepseek_v2.modeling_deepseek_v2")
    for method, rule in ("group_limited_greedy", V2), ("greedy", LITE):
        config = hf.DeepseekV2Config(
            hidden_size=32,
            moe_intermediate_size=24,
            n_routed_experts=16,
            num_experts_per_tok=4,
            n_shared_experts=2,
            topk_method=method,
            n_group=4,
            topk_group=2,
            routed_scaling_factor=rule.get("routed_scaling_factor", 1.0),
            norm_topk_prob=False,
        )
        theirs, ours = hf.DeepseekV2Moe(config), layer(2, **rule).float()
        theirs.load_state_dict(ours.state_dict())
        x = torch.randn(2, 40, 32)
        assert_close(ours(x), theirs(x), 1e-4)


def test_the_zero_mask_is_caught():
    """Dropped groups at 0 beat biased scores below 0: the mistake must change what we see."""
    gate = layer(bias=-0.8, **V3).gate
    x = torch.randn(2000, 32, dtype=torch.float64)
    _, _, scores = gate(x)
    choice = scores + gate.e_score_correction_bias
    rank = choice.unflatten(-1, (4, 4)).topk(2).values.sum(-1)
    kept = torch.zeros_like(rank).scatter_(1, rank.topk(2).indices, 1).repeat_interleave(4, 1)
    wrong = (choice * kept).topk(4).indices.sort().values
    right = gate.choose(scores).sort().values
    assert 0.2 < (wrong != right).any(-1).double().mean() < 0.8
    inside = kept.gather(1, right)
    assert inside.all()  # no expert of a dropped group


def test_bias_chooses_and_never_weighs():
    gate = moe.Router(32, 16, 4, 4, 2, 2.5).double()
    x = torch.randn(300, 32, dtype=torch.float64)
    before, _, _ = gate(x)
    gate.e_score_correction_bias[3] = 10.0
    indices, weights, scores = gate(x)
    assert (indices == 3).any(-1).all() and not (before == 3).any(-1).all()
    own = scores.gather(1, indices)
    assert_close(weights, 2.5 * own / own.sum(-1, keepdim=True))
    gate.e_score_correction_bias += 7.0  # the same for all: no choice changes
    assert torch.equal(gate(x)[0].sort().values, indices.sort().values)


def test_bias_has_no_gradient_and_scores_have():
    made, x = layer(**V3), torch.randn(1, 20, 32, dtype=torch.float64)
    made(x).sum().backward()
    assert not made.gate.e_score_correction_bias.requires_grad
    assert made.gate.weight.grad.abs().sum() > 0


def test_scores_are_fp32_under_autocast():
    gate, x = moe.Router(64, 8, 2), torch.randn(100, 64)
    want = gate(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = gate(x)
    for mine, other in zip(got, want, strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"num_experts_per_tok": 9}, "9"),
        ({"num_experts_per_tok": 0}, "0"),
        ({"n_group": 3}, "3"),
        ({"n_group": 4, "topk_group": 5}, "5"),
        ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "3"),
        ({"n_group": 8, "topk_group": 4}, "8"),
        ({"scoring_func": "tanh"}, "tanh"),
        ({"topk_method": "random"}, "random"),
    ],
)
def test_impossible_routers_are_named(arguments, words):
    sizes = {"hidden_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2}
    with pytest.raises(ValueError, match=words):
        moe.Router(**sizes | arguments)


# The bias -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_bias_stays_fp32(dtype):
    gate = moe.Router(16, 8, 2)
    gate.e_score_correction_bias.copy_(1 + torch.arange(8) / 1000)  # bf16 would make them two
    want = gate.e_score_correction_bias.clone()
    for made in (copy.deepcopy(gate).to(dtype), copy.deepcopy(gate).half().float()):
        assert made.e_score_correction_bias.dtype == torch.float32
        assert torch.equal(made.e_score_correction_bias, want)
    assert torch.equal(moe.MoE(16, 8, 8, 2).to(dtype).gate.e_score_correction_bias, torch.zeros(8))


def test_bias_after_the_meta_device_is_zero():
    with torch.device("meta"):
        made = moe.MoE(16, 8, 8, 2)
    assert torch.equal(made.to_empty(device="cpu").gate.e_score_correction_bias, torch.zeros(8))


def test_bias_step_by_hand():
    gate = moe.Router(16, 4, 2)
    gate.update_bias(torch.tensor([9, 1, 5, 5]), 0.1)  # mean 5
    assert_close(gate.e_score_correction_bias, torch.tensor([-0.1, 0.1, 0.0, 0.0]), 1e-7)
    gate.update_bias(torch.tensor([9, 1, 1, 1]), 0.1, center=True)  # signs −1, 1, 1, 1
    assert_close(gate.e_score_correction_bias, torch.tensor([-0.25, 0.15, 0.05, 0.05]), 1e-7)


def test_bias_step_refuses():
    with pytest.raises(ValueError, match="3"):
        moe.Router(16, 4, 2).update_bias(torch.ones(3), 0.1)
    with pytest.raises(ValueError, match="greedy"):
        moe.Router(16, 4, 2, topk_method="greedy").update_bias(torch.ones(4), 0.1)


@pytest.mark.parametrize("sign, fair", [(1, True), (-1, False)])
def test_bias_evens_the_load(sign, fair):
    """In a closed loop the load becomes even; with the sign reversed it collapses."""
    gate = moe.Router(16, 8, 2)
    common = 2 * torch.randn(16)
    for _ in range(300):
        indices, _, _ = gate(common + torch.randn(512, 16))
        load = indices.flatten().bincount(minlength=8)
        gate.update_bias(load, sign * 0.01)
    violation = moe.max_violation(load)
    assert (violation < 0.4) if fair else (violation > 2.5)  # collapsed: E/K − 1 = 3


def test_eval_moves_no_bias_and_recomputation_counts_once():
    made = moe.MoE(32, 24, 16, 4, **V3)
    x = torch.randn(2, 20, 32, requires_grad=True)
    made(x).sum().backward()
    load = made.load.clone()
    assert load.sum() == 2 * 20 * 4 and load.dtype == torch.int64
    checkpoint(made, x, use_reentrant=False).sum().backward()  # runs the forward again
    assert torch.equal(made.load, load)
    before = made.gate.e_score_correction_bias.clone()
    made.eval()(x[:1])
    assert torch.equal(made.gate.e_score_correction_bias, before)
    assert made.balance_loss is None and made.load.sum() == 20 * 4


# The balance loss ---------------------------------------------------------------------------


def test_balance_loss_is_eq_17_to_20():
    B, T, E, K = 3, 10, 6, 2
    scores = torch.rand(B, T, E, dtype=torch.float64)
    indices = scores.topk(K).indices
    total = 0.0
    for b in range(B):
        for e in range(E):
            f = E / (K * T) * sum(e in row for row in indices[b].tolist())
            P = sum((scores[b, t, e] / scores[b, t].sum()).item() for t in range(T)) / T
            total += f * P / B
    got = moe.sequence_balance_loss(scores, indices)
    assert_close(got, torch.tensor(total, dtype=torch.float64))


def test_balance_loss_gradient():
    scores = torch.rand(2, 8, 6, dtype=torch.float64, requires_grad=True)
    indices = scores.topk(2).indices  # held: f carries no gradient
    assert torch.autograd.gradcheck(lambda s: moe.sequence_balance_loss(s, indices), scores)


def test_balance_loss_is_one_when_even_and_more_when_not():
    even, turns = torch.ones(1, 6, 6), torch.arange(6).view(1, 6, 1)
    assert moe.sequence_balance_loss(even, turns) == 1
    skewed = torch.tensor([4.0, 1, 1, 1, 1, 1]).expand(1, 6, 6)
    assert moe.sequence_balance_loss(skewed, torch.zeros_like(turns)) > 2


def test_balance_loss_is_per_sequence():
    """Two sequences, each on its own expert: even in the batch, uneven in each."""
    scores = torch.tensor([[[3.0, 1.0]], [[1.0, 3.0]]]).expand(2, 4, 2)
    assert moe.sequence_balance_loss(scores, scores.topk(1).indices) == 1.5


def test_max_violation():
    load = torch.tensor([[6, 2, 2, 2], [3, 3, 3, 3]])
    assert_close(moe.max_violation(load), torch.tensor([1.0, 0.0], dtype=torch.float64), 0)


# Dispatch and the grouped GEMM --------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=7),
    A=st.integers(1, 9),
    B=st.integers(1, 9),
)
def test_grouped_gemm_is_a_loop(sizes, A, B):
    """Empty experts included; output and gradients."""
    x = torch.randn(sum(sizes), A, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(len(sizes), B, A, dtype=torch.float64, requires_grad=True)
    got = moe.grouped_gemm(x, weight, torch.tensor(sizes))
    want = torch.cat([r @ w.T for r, w in zip(x.split(sizes), weight, strict=True)])
    assert_close(got, want)
    upstream = torch.randn_like(got)
    for mine, other in zip(
        torch.autograd.grad(got, (x, weight), upstream),
        torch.autograd.grad(want, (x, weight), upstream),
        strict=True,
    ):
        assert_close(mine, other)


def test_grouped_gemm_gradcheck():
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    sizes = torch.tensor([4, 0, 2])
    assert torch.autograd.gradcheck(lambda x, w: moe.grouped_gemm(x, w, sizes), (x, weight))


def test_grouped_gemm_under_autocast_is_bf16():
    x, weight = torch.randn(6, 32), torch.randn(2, 16, 32)
    with torch.autocast("cpu", torch.bfloat16):
        got = moe.grouped_gemm(x, weight, torch.tensor([2, 4]))
    want = torch.cat([x[:2] @ weight[0].T, x[2:] @ weight[1].T])
    assert got.dtype == torch.bfloat16
    # operands rounded to 8 bits, 32 products: about 2^-8 · √32 of outputs of size √32
    assert (got.float() - want).abs().max() < 2**-8 * 32


@pytest.mark.parametrize(
    "x, weight, sizes",
    [((6, 4), (2, 3, 5), [2, 4]), ((6, 4), (2, 3, 4), [2, 3]), ((6, 4), (2, 3, 4), [6])],
)
def test_grouped_gemm_refuses(x, weight, sizes):
    with pytest.raises(ValueError, match=str(x[0])):
        moe.grouped_gemm(torch.randn(x), torch.randn(weight), torch.tensor(sizes))


@pytest.mark.parametrize("N", [1, 7, 200])
def test_bf16_layout_changes_nothing(N):
    """Rows that fill a segment up to 16 must not be seen: not in outputs, not in gradients."""
    made = moe.MoE(32, 24, 16, 4, 1)
    x = torch.randn(1, N, 32)
    x[0, 0] = 1e4  # token 0 stands in for the missing rows: loud, so that it would show
    results = []
    for bf16 in (False, True):
        made.zero_grad()
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            y = made(inputs)
        y.float()[:, 1:].sum().backward()
        grads = [p.grad.flatten() for p in made.parameters() if p.grad is not None]
        results.append([y[:, 1:].float().flatten(), torch.cat([*grads, inputs.grad.flatten()])])
    for want, got in zip(*results, strict=True):
        if want.numel():
            # three products in a row, 8 bits each, and near-ties of nothing: the router is fp32
            assert (got - want).norm() <= 0.03 * want.norm()


def test_no_token_is_dropped_when_all_choose_the_same():
    made = layer()
    made.gate.e_score_correction_bias.copy_(torch.arange(16) * 100.0)
    x = torch.randn(1, 50, 32, dtype=torch.float64)
    y = made(x)
    assert made.load.tolist() == [0] * 12 + [50] * 4
    assert_close(y, moe.moe_reference(made, x)[0], 20 * EXACT)


def test_seams_are_called():
    calls = []

    def spy(x, weight, sizes):
        calls.append((tuple(x.shape), sizes.tolist()))
        return moe.grouped_gemm(x, weight, sizes)

    class Linear(torch.nn.Linear):
        pass

    made = moe.MoE(32, 24, 16, 4, 1, linear=Linear, grouped_gemm=spy)
    made(torch.randn(1, 10, 32))
    assert [shape for shape, _ in calls] == [(40, 32), (40, 24)]
    assert calls[0][1] == made.load.tolist()
    assert all(type(m) is Linear for m in made.shared_experts.children())


def test_swiglu():
    made, x = moe.SwiGLU(8, 12).double(), torch.randn(3, 8, dtype=torch.float64)
    gate, up = made.gate_proj(x), made.up_proj(x)
    assert_close(made(x), made.down_proj(gate * torch.sigmoid(gate) * up))
    assert_close(F.silu(gate), gate * torch.sigmoid(gate))
