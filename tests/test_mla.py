"""02_mla.py against transformers' DeepseekV3Attention, and against itself in its two forms."""

import copy
import importlib.util
import itertools
import math
import re
import warnings
from importlib import import_module

import pytest
import torch
from ahead import SHARED_LIMIT, compile_by_head, compile_decode, compile_hopper, interpret
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

attn = import_module("01_attention")
mla = import_module("02_mla")

EXACT = 1e-12  # float64: sums of at most a few hundred terms of size 1, each off by 1e-16
SIZES = dict(
    hidden_size=24, num_attention_heads=4, kv_lora_rank=16,
    qk_nope_head_dim=10, qk_rope_head_dim=8, v_head_dim=6,
)  # fmt: skip
STRETCH = dict(factor=4.0, original_max_position_embeddings=16, beta_fast=2.0, beta_slow=0.1)
EQUAL = dict(type="yarn", mscale=1.0, mscale_all_dim=1.0, **STRETCH)
UNEQUAL = dict(type="yarn", mscale=0.707, mscale_all_dim=1.3, **STRETCH)
FORMS = pytest.mark.parametrize("absorb", [False, True], ids=["explicit", "absorbed"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_close(got, want, tol=EXACT):
    assert got.shape == want.shape and got.dtype == want.dtype
    error = (got.double() - want.double()).abs().max().item()
    assert error <= tol, f"error {error:.2e} > {tol:.0e}"


def make(std=0.3, **arguments):
    """Norm weights are random too: a gain of one could sit anywhere."""
    arguments = {"rope_theta": 100.0, **SIZES, **arguments}
    layer = mla.MultiHeadLatentAttention(**arguments).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=std)
    return layer


def inputs(B, T, grad=False):
    return torch.randn(B, T, 24, dtype=torch.float64, requires_grad=grad)


def cache_for(layer, B, room, dtype=torch.float64):
    return mla.LatentCache(B, room, *layer.latent_split, dtype=dtype)


def gradients(layer, x, upstream, **how):
    """The output and every gradient by name, of a fresh backward."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    out = layer(x, **how)
    out.backward(upstream)
    return out, {"x": x.grad} | {n: p.grad.clone() for n, p in layer.named_parameters()}


# transformers -------------------------------------------------------------------------------


def theirs(Q, interleaved, yarn, dtype=torch.float64):
    hf = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    rope = {"rope_type": "default"}
    if yarn:
        rope = {**yarn, "rope_type": "yarn"}
        rope.pop("type")
    config = hf.DeepseekV3Config(
        **SIZES,
        num_key_value_heads=4,
        q_lora_rank=Q,
        rope_interleave=interleaved,
        rope_parameters={**rope, "rope_theta": 100.0},
        max_position_embeddings=64,
        attn_implementation="sdpa" if dtype is torch.float64 else "eager",
    )
    return hf.DeepseekV3Attention(config, layer_idx=0).to(dtype), hf.DeepseekV3RotaryEmbedding(
        config
    )


CASES = [
    pytest.param(Q, interleaved, yarn, id=f"{q}-{layout}-{y}")
    for (Q, q), (interleaved, layout), (yarn, y) in itertools.product(
        [(None, "q_proj"), (20, "q_lora")],
        [(True, "interleaved"), (False, "half_split")],
        [(None, "no_yarn"), (EQUAL, "yarn"), (UNEQUAL, "mscales_differ")],
    )
]


@FORMS
@pytest.mark.parametrize("Q, interleaved, yarn", CASES)
def test_is_deepseek_v3_attention(Q, interleaved, yarn, absorb):
    """Output and every gradient, at positions up to 4x past the original context of 16."""
    T = 70
    rival, rotary = theirs(Q, interleaved, yarn)
    ours = make(q_lora_rank=Q, rope_interleave=interleaved, rope_scaling=yarn)
    rival.load_state_dict(ours.state_dict())
    # Its norms and rotation round to fp32 whatever they get: replaced, the comparison is exact.
    for name, width in ("q_a_layernorm", Q), ("kv_a_layernorm", 16):
        if width:
            norm = nn.RMSNorm(width, eps=1e-6, dtype=torch.float64)
            norm.weight.data = getattr(rival, name).weight.data
            setattr(rival, name, norm)
    angles = torch.outer(torch.arange(T), ours.frequencies.double()).repeat(1, 2)[None]
    cos, sin = angles.cos() * rotary.attention_scaling, angles.sin() * rotary.attention_scaling
    future = torch.full((T, T), float("-inf"), dtype=torch.float64).triu(1)[None, None]

    x, upstream = inputs(2, T), inputs(2, T)
    x2 = x.clone().requires_grad_()
    got, grads = gradients(ours, x, upstream, absorb=absorb)
    want, _ = rival(x2, (cos, sin), future)
    want.backward(upstream)
    assert_close(got, want)
    assert_close(grads.pop("x"), x2.grad, 1e-11)  # sums over 70 queries of size up to 100
    assert len(grads) == (7 if Q else 5)
    for name, grad in grads.items():
        assert_close(grad, rival.get_parameter(name).grad, 1e-11)


@pytest.mark.parametrize("Q, interleaved, yarn", CASES)
def test_is_deepseek_v3_attention_untouched_fp32(Q, interleaved, yarn):
    """The rival with its own norms, frequencies, rotation and eager attention."""
    T = 70
    rival, rotary = theirs(Q, interleaved, yarn, torch.float32)
    ours = make(q_lora_rank=Q, rope_interleave=interleaved, rope_scaling=yarn).float()
    rival.load_state_dict(ours.state_dict())
    x = torch.randn(2, T, 24)
    future = torch.full((T, T), float("-inf")).triu(1)[None, None]
    cos_sin = rotary(x, torch.arange(T)[None])
    # 24 bits, through five products; an angle of 70 is off by 4e-6, a logit of size 10 by 4e-5
    assert_close(ours(x), rival(x, cos_sin, future)[0], 1e-4)


@pytest.mark.parametrize("yarn", [EQUAL, UNEQUAL], ids=["equal", "unequal"])
def test_rotary_constants_are_those_of_transformers(yarn):
    rival, rotary = theirs(None, True, yarn)
    ours = make(rope_scaling=yarn)
    assert ((ours.frequencies / rotary.inv_freq - 1).abs() <= 2**-22).all()  # two fp32 roundings
    assert ours.amplitude == pytest.approx(rotary.attention_scaling, rel=1e-15)
    assert ours.scale == pytest.approx(rival.scaling, rel=1e-15)


# The two forms ------------------------------------------------------------------------------
ODD_SIZES = {
    "the_usual": {},
    "one_head": dict(num_attention_heads=1),
    "values_wider_than_keys": dict(v_head_dim=30),
    "latent_narrower_than_heads": dict(kv_lora_rank=3),
    "two_rotary_channels": dict(qk_rope_head_dim=2),
    "no_yarn": dict(rope_scaling=None),
    "q_lora": dict(q_lora_rank=5),
}


@pytest.mark.parametrize("sizes", ODD_SIZES.values(), ids=ODD_SIZES)
@pytest.mark.parametrize("T", [1, 2, 33])
def test_absorbed_is_explicit(sizes, T):
    layer = make(**{"rope_scaling": UNEQUAL, **sizes})
    x, upstream = inputs(2, T), inputs(2, T)
    explicit, want = gradients(layer, x, upstream, absorb=False)
    absorbed, got = gradients(layer, x, upstream, absorb=True)
    assert_close(absorbed, explicit)
    for name in want:
        assert_close(got[name], want[name], 1e-11)  # weight gradients sum over all tokens


@FORMS
def test_is_the_equations_one_number_at_a_time(absorb):
    layer, x = make(q_lora_rank=20, rope_scaling=UNEQUAL), inputs(1, 20)
    want = mla.mla_reference(layer, x[0], SIZES, UNEQUAL)
    assert_close(layer(x, absorb=absorb)[0], want)


@FORMS
def test_gradcheck(absorb):
    small = dict(hidden_size=6, num_attention_heads=2, kv_lora_rank=4, q_lora_rank=3)
    small |= dict(qk_nope_head_dim=3, qk_rope_head_dim=2, v_head_dim=2)
    layer = make(std=0.7, rope_scaling=UNEQUAL, **small)
    x = torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True)
    names, weights = zip(*layer.named_parameters(), strict=True)

    def call(x, *weights):
        named = dict(zip(names, weights, strict=True))
        return functional_call(layer, named, (x,), {"absorb": absorb})

    assert torch.autograd.gradcheck(call, (x, *weights))


@FORMS
def test_the_future_has_no_gradient(absorb):
    layer, x = make(), inputs(1, 9, grad=True)
    layer(x, absorb=absorb)[0, 4].sum().backward()
    assert (x.grad[0, 5:] == 0).all() and (x.grad[0, :5] != 0).all()


@FORMS
@pytest.mark.parametrize("Q", [None, 20], ids=["q_proj", "q_lora"])
def test_layouts_are_one_after_permuting_rows(Q, absorb):
    layer, x = make(q_lora_rank=Q, rope_scaling=EQUAL), inputs(2, 30)
    other = make(q_lora_rank=Q, rope_scaling=EQUAL, rope_interleave=False)
    other.load_state_dict(layer.state_dict())
    assert (other(x) - layer(x)).abs().max() > 1e-3  # the layout matters
    order = attn.half_split_order(8)
    q_proj = other.q_proj if Q is None else other.q_b_proj
    for rows in (*q_proj.weight.data.split(18), other.kv_a_proj_with_mqa.weight.data):
        rows[-8:] = rows[-8:][order]
    assert_close(other(x, absorb=absorb), layer(x))


class Shapes(TorchDispatchMode):
    """Records the size of every tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.numels = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.numels += [t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        return out


def test_absorbed_form_makes_no_key_or_value_of_a_head():
    """Nor the product W_UQ·W_UK: nothing but the weights and the cache is large."""
    S, H, N, L, R, Q, C = 4000, 8, 16, 32, 4, 500, 24
    layer = make(
        num_attention_heads=H, kv_lora_rank=L, qk_nope_head_dim=N, qk_rope_head_dim=R,
        v_head_dim=N, q_lora_rank=Q, rope_scaling=EQUAL,
    )  # fmt: skip
    largest = max(S * (L + R), Q * H * (N + R))  # the cache, a weight
    assert largest < min(S * H * N, H * Q * L * 2, S * H * (N + R))
    for absorb, small in (True, True), (None, True), (False, False):
        cache = cache_for(layer, 1, S)
        cache.append(torch.randn(1, S - 1, L), torch.randn(1, S - 1, R))
        with torch.no_grad(), Shapes() as seen:
            layer(torch.randn(1, 1, C, dtype=torch.float64), cache, absorb)
        assert (max(seen.numels) <= largest) == small
        merged = H * Q * L
        assert not small or merged not in seen.numels


# The cache ----------------------------------------------------------------------------------


def splits(T):
    """All 2^(T−1) ways to cut T tokens into consecutive parts."""
    for cuts in itertools.product([False, True], repeat=T - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), T]
        yield [b - a for a, b in itertools.pairwise(edges)]


@torch.no_grad()
@pytest.mark.parametrize("absorb", [None, True, False], ids=["auto", "absorbed", "explicit"])
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half_split"])
@pytest.mark.parametrize("yarn", [None, UNEQUAL], ids=["no_yarn", "yarn"])
def test_every_split_is_one_pass(absorb, interleaved, yarn):
    T, layer = 7, make(rope_interleave=interleaved, rope_scaling=yarn, q_lora_rank=20)
    x = inputs(2, T)
    want = layer(x)
    for sizes in splits(T):
        cache = cache_for(layer, 2, T)
        got = torch.cat([layer(part, cache, absorb) for part in x.split(sizes, dim=1)], dim=1)
        assert_close(got, want)
        assert cache.lengths.tolist() == [T, T] and cache.used == T


@torch.no_grad()
@pytest.mark.parametrize("absorb", [None, False], ids=["auto", "explicit"])
def test_decoding_far_past_the_original_context(absorb):
    layer, x = make(rope_scaling=EQUAL, q_lora_rank=20), inputs(1, 300)
    cache = cache_for(layer, 1, 300)
    parts = [layer(part, cache, absorb) for part in x.split([200, 50] + [1] * 50, dim=1)]
    assert_close(torch.cat(parts, 1), layer(x), 1e-11)  # angles of 300: 1e-13 each


@torch.no_grad()
@pytest.mark.parametrize("absorb", [None, True, False], ids=["auto", "absorbed", "explicit"])
@pytest.mark.parametrize("lengths", [[1, 7, 4], [6, 2, 2], [7, 7, 7], [0, 3, 1]], ids=str)
def test_unequal_prompts_are_each_row_alone(lengths, absorb):
    layer, total = make(rope_scaling=UNEQUAL), 12
    x = inputs(3, total)
    prompts = torch.full((3, 7, 24), 5.0, dtype=torch.float64)  # 5.0: padding that would show
    for row, n in enumerate(lengths):
        prompts[row, :n] = x[row, :n]
    cache = cache_for(layer, 3, total)
    prefill = layer(prompts, cache, absorb)
    cache.truncate(torch.tensor(lengths))
    assert cache.used == max(lengths)
    steps = [
        [x[row, n + i : n + i + t] for row, n in enumerate(lengths)] for i, t in [(0, 1), (1, 3)]
    ]
    got = torch.cat([layer(torch.stack(step), cache, absorb) for step in steps], dim=1)
    for row, n in enumerate(lengths):
        alone = layer(x[row : row + 1, : n + 4])[0]
        assert_close(torch.cat([prefill[row, :n], got[row]]), alone)
    assert cache.lengths.tolist() == [n + 4 for n in lengths]


@torch.no_grad()
@pytest.mark.parametrize("rows", [[2, 0], [1, 1, 0, 2], [True, False, True]], ids=str)
def test_selected_rows_go_on_as_if_alone(rows):
    layer, x = make(), inputs(3, 5)
    cache = cache_for(layer, 3, 12)
    layer(x, cache)
    cache.truncate([5, 2, 4])
    rows = torch.tensor(rows)
    cache.select(rows)
    new = torch.randn(len(cache.lengths), 3, 24, dtype=torch.float64)
    got = layer(new, cache)
    for i, row in enumerate(torch.arange(3)[rows].tolist()):
        whole = torch.cat((x[row, : [5, 2, 4][row]], new[i]))
        assert_close(got[i], layer(whole[None])[0, -3:])


@torch.no_grad()
@pytest.mark.parametrize("kept", [[5, 5], [3, 5], [0, 2], 4, 0], ids=str)
def test_truncate_leaves_no_trace(kept):
    """A rejected draft, huge on purpose: the same bits as a cache that never saw it."""
    layer = make()
    x, new = inputs(2, 5), inputs(2, 3)
    drafted, clean = cache_for(layer, 2, 12), cache_for(layer, 2, 12)
    for cache in (drafted, clean):
        layer(x, cache)
    before = drafted.lengths
    layer(torch.full((2, 4, 24), 1e6, dtype=torch.float64), drafted)
    drafted.truncate(before)
    assert drafted.lengths.tolist() == [5, 5]  # so appending left the caller's tensor alone
    for cache in (drafted, clean):
        cache.truncate(kept)
    assert torch.equal(drafted.lengths, clean.lengths) and drafted.used == clean.used
    assert torch.equal(layer(new, drafted), layer(new, clean))
    assert torch.equal(drafted.lengths, clean.lengths) and drafted.used == clean.used


def test_an_emptied_cache_trains_again():
    layer, x = make(), inputs(2, 5)
    cache = cache_for(layer, 2, 5)
    for _ in range(2):
        layer.zero_grad()
        layer(x, cache).sum().backward()
        cache.truncate(0)
    got = layer.kv_b_proj.weight.grad
    [want] = torch.autograd.grad(layer(x).sum(), [layer.kv_b_proj.weight])
    assert_close(got, want)


@pytest.mark.parametrize("B, T", [(2, 0), (0, 3), (0, 0)])
def test_no_tokens_are_no_trouble(B, T):
    layer = make()
    for cache in None, cache_for(layer, B, 8):
        for _ in range(2):
            assert layer(inputs(B, T), cache).shape == (B, T, 24)
    cache = cache_for(layer, 2, 8)
    want = layer(inputs(2, 3), cache), cache.lengths
    layer(inputs(2, 0), cache)
    assert torch.equal(cache.lengths, want[1]) and cache.used == 3


def test_cache_holds_the_normed_latent_and_the_turned_key_only():
    layer, x = make(rope_scaling=UNEQUAL), inputs(2, 5)
    cache = cache_for(layer, 2, 8)
    layer(x, cache)
    down = x @ layer.kv_a_proj_with_mqa.weight.T  # (B, T, L + R)
    latent = down[..., :16] * (down[..., :16].square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert_close(cache.entries[:, :5, :16], latent * layer.kv_a_layernorm.weight)
    m = 0.1 * math.log(4) * torch.tensor([0.707, 1.3]) + 1
    lengths = down[..., 16:].unflatten(-1, (-1, 2)).norm(dim=-1)  # a turn keeps a pair's length
    got = cache.entries[:, :5, 16:].unflatten(-1, (-1, 2)).norm(dim=-1)
    assert_close(got, lengths * (m[0] / m[1]).double(), 1e-6)  # the ratio above is in fp32
    tensors = [value for value in vars(cache).values() if isinstance(value, torch.Tensor)]
    assert sum(t.numel() for t in tensors) == 2 * 8 * 24 + 2  # entries, lengths


def test_append_returns_a_view_and_does_not_keep_the_callers_lengths():
    cache = mla.LatentCache(2, 8, 4, 2)
    entries = cache.append(torch.ones(2, 3, 4), torch.ones(2, 3, 2))
    assert entries.shape == (2, 3, 6) and entries.data_ptr() == cache.entries.data_ptr()
    lengths = torch.tensor([1, 2])
    cache.truncate(lengths)
    lengths += 5
    cache.append(torch.ones(2, 1, 4), torch.ones(2, 1, 2))
    assert cache.lengths.tolist() == [2, 3] and cache.used == 3


@FORMS
def test_gradients_pass_through_a_prefilled_cache(absorb):
    layer, x, upstream = make(), inputs(2, 6), inputs(2, 6)
    _, want = gradients(layer, x, upstream)
    _, got = gradients(layer, x, upstream, cache=cache_for(layer, 2, 8), absorb=absorb)
    for name in want:
        assert_close(got[name], want[name])


def test_gradients_pass_from_the_second_pass_to_the_first():
    layer, x = make(), inputs(2, 6)
    weights, cache = list(layer.parameters()), cache_for(layer, 2, 8)
    parts = [layer(part, cache, absorb=False) for part in x.split((4, 2), 1)]
    outs = torch.cat(parts, 1), layer(x)
    pairs = (torch.autograd.grad(out.square().sum(), weights) for out in outs)
    for got, want in zip(*pairs, strict=True):
        assert_close(got, want)


def test_only_rows_that_write_into_a_shared_page_need_a_copy():
    """A full page of three rows; one goes back into it: a copy and two new pages, all there are."""
    cache = mla.PagedLatentCache(1, 128, 4, 2, pool=4)
    cache.append(torch.randn(1, 64, 4), torch.randn(1, 64, 2))
    cache.select(torch.tensor([0, 0, 0]))
    cache.truncate(torch.tensor([60, 64, 64]))
    cache.append(torch.randn(3, 1, 4), torch.randn(3, 1, 2))
    assert cache.lengths.tolist() == [61, 65, 65] and not cache.free
    with pytest.raises(ValueError, match="0 of 4 pages are free, the new tokens need 1"):
        cache.append(torch.randn(3, 62, 4), torch.randn(3, 62, 2))


def test_absorbs_below_the_break_even():
    with torch.device("meta"):
        v3 = mla.MultiHeadLatentAttention(**mla.V3)
    assert v3.absorb_below == pytest.approx(512 * 256 / (1024 - 256))  # 170.7 tokens
    layer, x = make(), inputs(1, 40)
    assert layer.absorb_below == 16.0
    assert make(kv_lora_rank=8).absorb_below == math.inf
    calls = []
    for form in ("explicit", "absorbed"):
        method = getattr(layer, form)

        def spy(*args, form=form, method=method):
            calls.append(form)
            return method(*args)

        setattr(layer, form, spy)
    layer(x[:, :5])
    cache = cache_for(layer, 1, 40)
    for T in (3, 1, 15, 16):  # an empty cache, then a filled one
        layer(x[:, :T], cache)
    assert calls == ["explicit", "explicit", "absorbed", "absorbed", "explicit"]


# Numbers worked by hand ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "mscale, scale", [(None, 0.0721688), (1.0, 0.1352338), (0.707, 0.1147214)], ids=str
)
def test_softmax_scale_of_released_models(mscale, scale):
    yarn = mscale and dict(type="yarn", factor=40, mscale=mscale, mscale_all_dim=mscale)
    with torch.device("meta"):
        layer = mla.MultiHeadLatentAttention(**mla.V2_LITE, rope_scaling=yarn)
    assert layer.scale == pytest.approx(scale, abs=5e-8) and layer.amplitude == 1.0


def test_the_scale_takes_mscale_all_dim_and_the_rotation_the_ratio():
    layer = make(rope_scaling=dict(factor=40, mscale=0.5, mscale_all_dim=0.8))
    m = 1 + 0.08 * math.log(40)
    assert layer.scale == pytest.approx(18**-0.5 * m * m, rel=1e-14)
    assert layer.amplitude == pytest.approx((1 + 0.05 * math.log(40)) / m, rel=1e-14)
    bare = make(rope_scaling=dict(factor=40))  # DeepSeek's defaults: mscale 1, mscale_all_dim 0
    assert bare.scale == 18**-0.5 and bare.amplitude == pytest.approx(1 + 0.1 * math.log(40))


def test_yarn_ratios_of_v3():
    ratio = mla.yarn_frequencies(64, factor=40) / mla.yarn_frequencies(64)
    want = {0: 1, 10: 1, 11: 0.925, 16: 0.55, 22: 0.1, 23: 0.025, 31: 0.025}
    for pair, value in want.items():
        assert ratio[pair].item() == pytest.approx(value, abs=1e-6)


def test_without_stretching_it_is_rope():
    assert torch.equal(mla.yarn_frequencies(64, 500.0), attn.rope_frequencies(64, 500.0))
    assert torch.equal(make(qk_rope_head_dim=64).frequencies, attn.rope_frequencies(64, 100.0))


@settings(max_examples=100, deadline=None)
@given(
    pairs=st.integers(1, 64),
    theta=st.floats(10, 1e6),
    factor=st.floats(1, 64),
    context=st.integers(16, 65536),
    fast=st.floats(2, 64),
    slow=st.floats(0.05, 1.5),
)
def test_yarn_is_the_reference_pair_by_pair(pairs, theta, factor, context, fast, slow):
    arguments = (2 * pairs, theta, factor, context, fast, slow)
    got, want = mla.yarn_frequencies(*arguments).double(), mla.yarn_reference(*arguments)
    plain = mla.yarn_frequencies(2 * pairs, theta).double()
    # theta^(−2p/dim) in fp32: rounding the exponent costs ln(theta) · 2^-24, 14 at most
    assert ((got / want - 1).abs() <= 1e-5).all()
    assert (got <= plain * (1 + 1e-6)).all() and (got >= plain / factor * (1 - 1e-6)).all()


@pytest.mark.parametrize(
    "sizes, count", [(mla.V3, 187_107_328), (mla.V2_LITE, 13_763_072)], ids=["v3", "v2_lite"]
)
def test_parameters_are_named_and_shaped_as_released(sizes, count):
    with torch.device("meta"):
        layer = mla.MultiHeadLatentAttention(**sizes)
    assert sum(p.numel() for p in layer.parameters()) == count
    shapes = {name: tuple(tensor.shape) for name, tensor in layer.state_dict().items()}
    if sizes is mla.V3:
        want = {
            "q_a_proj": (1536, 7168), "q_a_layernorm": (1536,), "q_b_proj": (24576, 1536),
            "kv_a_proj_with_mqa": (576, 7168), "kv_a_layernorm": (512,),
            "kv_b_proj": (32768, 512), "o_proj": (7168, 16384),
        }  # fmt: skip
    else:
        want = {
            "q_proj": (3072, 2048), "kv_a_proj_with_mqa": (576, 2048), "kv_a_layernorm": (512,),
            "kv_b_proj": (4096, 512), "o_proj": (2048, 2048),
        }  # fmt: skip
    assert shapes == {f"{name}.weight": shape for name, shape in want.items()}


@pytest.mark.parametrize("L, R, numbers", [(512, 64, 576), (32, 8, 40)])
def test_a_cached_token_is_576_numbers_at_v3s_sizes(L, R, numbers):
    assert mla.LatentCache(3, 7, L, R).entries.numel() == 3 * 7 * numbers


# Widths, devices, seams ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_frequencies_stay_fp32(dtype):
    layer = mla.MultiHeadLatentAttention(**SIZES, rope_scaling=EQUAL).to(dtype)
    want = mla.yarn_frequencies(8, **STRETCH)
    assert layer.o_proj.weight.dtype == dtype
    assert layer.frequencies.dtype == torch.float32 and torch.equal(layer.frequencies, want)
    assert torch.equal(copy.deepcopy(layer).frequencies, want)
    cos, sin = layer.cos_sin(torch.tensor([1000]), dtype)
    angle = 1000 * want.double()
    # an fp32 angle of 1000 is off by 2^-15 (half a step of 2^-14); bf16 anywhere would show 2^-9
    for got, exact in (cos, angle.cos()), (sin, angle.sin()):
        assert_close(got, exact.float()[None], 2**-14)
    assert layer(torch.randn(1, 5, 24, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("how", ["to_empty", "assign"])
def test_frequencies_survive_the_meta_device(how):
    source = make(rope_scaling=EQUAL).float()
    with torch.device("meta"):
        layer = mla.MultiHeadLatentAttention(**SIZES, rope_theta=100.0, rope_scaling=EQUAL)
        assert layer(torch.randn(1, 5, 24)).is_meta  # shapes only, and then for real
    if how == "to_empty":
        layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    else:
        layer.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(1, 40, 24)
    assert torch.equal(layer(x), source(x))
    assert torch.equal(layer.frequencies, source.frequencies)


@FORMS
def test_bf16_layer_is_near_the_float64_layer(absorb):
    layer = mla.MultiHeadLatentAttention(**SIZES, q_lora_rank=20, rope_scaling=EQUAL)
    layer = layer.to(torch.bfloat16)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(2, 300, 24, dtype=torch.bfloat16)
    got, want = layer(x, absorb=absorb).double(), exact(x.double())
    # seven roundings in a row, 2^-9 each, on outputs below 1
    assert (got - want).abs().max() <= 7 * 2**-9


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("absorb", [None, False], ids=["auto", "explicit"])
def test_autocast_with_a_cache_of_either_width_and_no_warning(kept, absorb):
    layer = mla.MultiHeadLatentAttention(**SIZES, q_lora_rank=20, rope_scaling=EQUAL)
    x = torch.randn(2, 30, 24)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        want = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            whole, cache = layer(x), cache_for(layer, 2, 30, kept)
            parts = [layer(part, cache, absorb) for part in x.split([20, 5, 1, 1, 1, 1, 1], 1)]
    assert whole.dtype == torch.bfloat16 and cache.entries.dtype == kept
    for got in (whole, torch.cat(parts, 1)):
        assert (got.float() - want).abs().max() <= 8 * 2**-9  # one more for the rounded weights


@FORMS
def test_training_under_autocast_fills_fp32_gradients(absorb):
    layer = mla.MultiHeadLatentAttention(**SIZES, q_lora_rank=20)
    x = torch.randn(2, 30, 24)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x, absorb=absorb)
        out.float().square().sum().backward()
    grads = [p.grad for p in layer.parameters()]
    assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in grads)


@pytest.mark.parametrize("absorb", [None, False], ids=["auto", "explicit"])
def test_a_bf16_cache_of_an_fp32_layer_costs_its_rounding_only(absorb):
    layer = mla.MultiHeadLatentAttention(**SIZES, rope_scaling=EQUAL)
    x, cache = torch.randn(2, 30, 24), cache_for(layer, 2, 30, torch.bfloat16)
    with torch.no_grad():
        parts = [layer(part, cache, absorb) for part in x.split([20, 9, 1], dim=1)]
        got, want = torch.cat(parts, 1), layer(x)
    assert got.dtype == torch.float32
    # absorbed, the query, the weights and the mix are bf16 as the cache is: four roundings
    assert (got - want).abs().max() <= 4 * 2**-9


@pytest.mark.parametrize(
    "name",
    [f"{kind}attention" for kind in ("", "torch_", "online_softmax_", "flash_", "tiled_")],
)
def test_functions_of_chapter_01_fit_the_seam(name):
    layer, x = make(rope_scaling=EQUAL), inputs(2, 12)
    other = make(rope_scaling=EQUAL, attention=getattr(attn, name))
    other.load_state_dict(layer.state_dict())
    assert_close(other(x), layer(x))
    cache = cache_for(other, 2, 12)
    parts = [other(part, cache, False) for part in x.split([5, 1, 6], dim=1)]
    assert_close(torch.cat(parts, 1), layer(x))


def test_seam_is_called_and_sees_mask_only_where_needed():
    calls = []

    def spy(q, k, v, causal, scale, mask):
        calls.append((tuple(q.shape), tuple(k.shape), tuple(v.shape), causal, mask is None, scale))
        return mla.padded_attention(q, k, v, causal, scale, mask)

    layer = make(attention=spy, rope_scaling=EQUAL)
    x, cache = inputs(2, 3), cache_for(layer, 2, 6)
    layer(x)
    layer(x, cache)  # all rows empty: the plain causal pass
    layer(x, cache, absorb=False)
    q, k, longer, v = (2, 4, 3, 18), (2, 4, 3, 18), (2, 4, 6, 18), (2, 4, 3, 6)
    plain = (q, k, v, True, True, layer.scale)
    assert calls == [plain, plain, (q, longer, (2, 4, 6, 6), False, False, layer.scale)]


def test_linear_is_every_projection_but_kv_b_proj():
    class Mine(nn.Linear):
        pass

    for Q in (None, 20):
        layer = mla.MultiHeadLatentAttention(**SIZES, q_lora_rank=Q, linear=Mine)
        plain = [name for name, m in layer.named_children() if type(m) is nn.Linear]
        assert plain == ["kv_b_proj"]


@pytest.mark.parametrize("V", [4, 8, 12], ids=["narrow", "equal", "wide"])
@pytest.mark.parametrize("T, S", [(9, 9), (3, 9), (1, 9), (1, 1)])
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "mask"])
def test_padded_attention_is_the_oracle(V, T, S, masked):
    shapes = (2, 3, T, 8), (2, 3, S, 8), (2, 3, S, V)
    ours = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    other = [t.detach().clone().requires_grad_() for t in ours]
    mask = torch.rand(2, 1, T, S) < 0.5 if masked else None
    if masked:
        mask[..., 0] = True  # a query that sees nothing is NaN
    got = mla.padded_attention(*ours, scale=0.4, mask=mask)
    want = attn.attention(*other, scale=0.4, mask=mask)
    assert_close(got, want)
    upstream = torch.randn_like(want)
    got.backward(upstream)
    want.backward(upstream)
    for mine, theirs in zip(ours, other, strict=True):
        assert_close(mine.grad, theirs.grad)
    full = mla.padded_attention(*ours, causal=False)
    assert_close(full, F.scaled_dot_product_attention(*ours))


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "mask"])
def test_mla_decode_is_multi_query_attention(T, masked):
    q, entries = torch.randn(2, 3, T, 7).double(), torch.randn(2, 9, 7).double()
    mask = torch.rand(2, 1, T, 9) < 0.5 if masked else None
    if masked:
        mask[..., 3] = True
    got = mla.mla_decode(q, entries, 5, 0.4, mask)
    k = entries[:, None]
    assert_close(got, attn.attention(q, k, k[..., :5], causal=False, scale=0.4, mask=mask))


@pytest.mark.parametrize("B, S, chunks", [(1, 3071, 2), (1, 4098, 4), (2, 4096, 2), (3, 4096, 0)])
def test_a_long_cache_is_read_in_chunks(B, S, chunks, monkeypatch):
    """1024 slots at least, and no more chunks than the rows leave threads; a few are left over."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    asked, whole = [], mla.chunked_decode
    monkeypatch.setattr(mla, "chunked_decode", lambda *a: asked.append(a[2]) or whole(*a))
    q, entries = torch.randn(B, 3, 2, 24).double(), torch.randn(B, S + 9, 24).double()[:, :S]
    got, k = mla.mla_decode(q, entries, 16, 0.4), entries[:, None]
    assert asked == [chunks] * (chunks > 0)
    assert_close(got, attn.attention(q, k, k[..., :16], causal=False, scale=0.4))
    mla.mla_decode(q, entries.requires_grad_(), 16, 0.4).sum().backward()
    mla.mla_decode(q, entries.detach(), 16, 0.4, lengths=torch.full((B,), S))
    assert len(asked) == (chunks > 0) and entries.grad[..., :16].all()


def test_chunks_read_what_lies_elsewise_and_nothing(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    entries = torch.randn(1, 4096, 24).double()
    none = torch.randn(1, 3, 0, 24).double()
    assert mla.mla_decode(none, entries, 16, 0.4).shape == (1, 3, 0, 16)
    q, turned = torch.randn(1, 24, 3, 1).permute(0, 2, 3, 1).double(), entries.mT.contiguous().mT
    for e in entries, turned:
        want = attn.attention(q, e[:, None], e[:, None, :, :16], causal=False, scale=0.4)
        assert_close(mla.mla_decode(q, e, 16, 0.4), want)


def test_the_benchs_plain_products_are_the_same_attention():
    q, entries = torch.randn(2, 3, 1, 24).double(), torch.randn(2, 50, 24).double()
    got = mla.matmul_decode(q, entries, 16, 0.4, lengths=None)
    assert_close(got, mla.mla_decode(q, entries, 16, 0.4))


def test_compiled_for_one_length_and_then_for_another():
    layer = mla.MultiHeadLatentAttention(**SIZES)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for T in 9, 5, 7, 1:
        x = torch.randn(2, T, 24)
        assert_close(compiled(x), layer(x), 1e-6)


def test_rows_of_a_paged_cache_are_chosen_by_a_list():
    cache = mla.PagedLatentCache(2, 100, 4, 2)
    cache.append(torch.randn(2, 70, 4), torch.randn(2, 70, 2))
    cache.select([0, 0, 1])
    assert cache.lengths.tolist() == [70, 70, 70] and torch.equal(cache.pages[0], cache.pages[1])


def test_mla_decode_keeps_scores_in_fp32():
    """Of 8 to 16 in size, which bf16 would round by up to 2^-5."""
    q = torch.randint(-2, 3, (1, 4, 1, 12)).bfloat16()
    entries = torch.randint(-1, 2, (1, 600, 12)).bfloat16()
    got = mla.mla_decode(q, entries, 10, 0.9)
    scores = 0.9 * (q.double() @ entries[:, None].double().mT)
    want = scores.softmax(-1) @ entries[:, None, :, :10].double()
    # half a step of 8 bits for weights and for the result
    assert (got.double() - want).abs().max() <= 2 * 2**-9


# Bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(qk_rope_head_dim=7), "7 channels are none or odd"),
        (dict(qk_rope_head_dim=0), "0 channels are none or odd"),
        (dict(rope_scaling=dict(type="linear", factor=4)), "linear"),
        (dict(rope_scaling=dict(rope_type="longrope", factor=4)), "longrope"),
        (dict(rope_scaling=dict(type="yarn", rope_type="dynamic", factor=4)), "dynamic"),
        (dict(rope_scaling=dict(type="yarn", factor=4, attention_factor=2)), "attention_factor"),
        (dict(rope_scaling=dict(type="yarn", factor=0.5)), "0.5"),
        (dict(rope_scaling=dict(type="yarn", mscale=0.9)), "no factor.*0.9"),
    ],
    ids=["odd", "none", "type", "rope_type", "types_disagree", "key", "factor", "no_factor"],
)
def test_layer_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        mla.MultiHeadLatentAttention(**{**SIZES, **arguments})


def test_both_spellings_of_the_type_and_none():
    for spelling in (dict(type="yarn"), dict(rope_type="yarn"), {}):
        assert torch.equal(
            make(rope_scaling={**spelling, **STRETCH}).frequencies,
            make(rope_scaling=EQUAL).frequencies,
        )
    given_config = dict(EQUAL)
    make(rope_scaling=given_config)
    assert given_config == EQUAL  # the caller's dict is left alone


def test_cache_overflow_changes_nothing():
    layer = make()
    x, cache = inputs(2, 5), cache_for(layer, 2, 8)
    layer(x, cache)
    cache.truncate([5, 1])
    stored = cache.entries.clone()
    with pytest.raises(ValueError, match="8 slots: 5 used \\+ 4 new"):
        layer(x[:, :4], cache)
    assert cache.lengths.tolist() == [5, 1] and cache.used == 5
    assert torch.equal(cache.entries, stored)
    assert layer(x[:, :3], cache).shape == (2, 3, 24)  # exactly full is allowed


@pytest.mark.parametrize("rows", [1, 3])
def test_a_cache_of_other_rows_is_refused(rows):
    layer = make()
    cache = cache_for(layer, rows, 8)
    with pytest.raises(ValueError, match=f"{rows} rows, x has 2"):
        layer(inputs(2, 3), cache)
    assert cache.used == 0


@pytest.mark.parametrize("L, R", [(17, 8), (15, 8), (16, 6), (18, 6)])
def test_a_cache_of_other_widths_is_refused(L, R):
    """18 + 6 = 16 + 8: the sum is not enough to go by."""
    layer, cache = make(), mla.LatentCache(2, 8, L, R, dtype=torch.float64)
    with pytest.raises(ValueError, match=rf"\(2, T, {L}\) and \(2, T, {R}\).*\(2, 3, 16\)"):
        layer(inputs(2, 3), cache)
    assert cache.used == 0


@pytest.mark.parametrize("lengths", [[4, 3], [-1, 2], 4], ids=str)
def test_truncate_refuses(lengths):
    cache = mla.LatentCache(2, 8, 4, 2)
    cache.append(torch.ones(2, 3, 4), torch.ones(2, 3, 2))
    with pytest.raises(ValueError, match=r"\[3, 3\]"):
        cache.truncate(lengths)
    assert cache.lengths.tolist() == [3, 3] and cache.used == 3


@pytest.mark.parametrize(
    "latent, k_rope",
    [((1, 3, 4), (1, 3, 2)), ((2, 3, 4), (2, 1, 2)), ((2, 3, 2), (2, 3, 4))],
    ids=["batch", "key_shorter", "swapped"],
)
def test_append_refuses(latent, k_rope):
    """Indexing would broadcast the first without a word, and the last has the right sum."""
    cache = mla.LatentCache(2, 8, 4, 2)
    with pytest.raises(ValueError, match=r"cache takes \(2, T, 4\) and \(2, T, 2\)"):
        cache.append(torch.ones(latent), torch.ones(k_rope))
    assert cache.used == 0


# Pages --------------------------------------------------------------------------------------


def contents(cache):
    """What each row holds, whatever the layout."""
    entries = cache.entries if cache.pages is None else mla.unpaged(cache.entries, cache.pages)
    return [row[:n] for row, n in zip(entries, cache.lengths.tolist(), strict=True)]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pages_hold_what_a_plain_cache_holds(data):
    """Append, truncate, select, in any order: the same rows, and no page is lost or held twice."""
    B = data.draw(st.integers(1, 4))
    plain, paged = mla.LatentCache(B, 400, 3, 2), mla.PagedLatentCache(B, 400, 3, 2, pool=40)
    for _ in range(data.draw(st.integers(1, 8))):
        B = len(plain.lengths)
        match data.draw(st.sampled_from(["append", "append", "truncate", "select"])):
            case "append":
                T = data.draw(st.sampled_from([0, 1, 1, 2, 63, 64, 65, 100]))
                if plain.used + T > 400:
                    continue
                need = sum(-(-(n + T) // 64) for n in plain.lengths.tolist())
                if need > 40:  # more than all pages, shared or not
                    continue
                new = torch.randn(B, T, 3), torch.randn(B, T, 2)
                plain.append(*new)
                paged.append(*new)
            case "truncate":
                kept = [data.draw(st.integers(0, n)) for n in plain.lengths.tolist()]
                plain.truncate(kept)
                paged.truncate(kept)
            case "select":
                rows = torch.tensor(
                    data.draw(st.lists(st.integers(0, B - 1), min_size=1, max_size=4))
                )
                plain.select(rows)
                paged.select(rows)
        assert torch.equal(plain.lengths, paged.lengths)
        assert plain.used == paged.used == plain.lengths.max()
        assert plain.even == paged.even == (len(plain.lengths.unique()) == 1)
        for mine, theirs in zip(contents(paged), contents(plain), strict=True):
            assert torch.equal(mine, theirs)
        held = sum(paged.held, [])
        assert [held.count(page) for page in range(40)] == paged.holders
        assert sorted(paged.free) == [page for page in range(40) if page not in held]
        assert paged.sizes == paged.lengths.tolist()


@torch.no_grad()
def test_a_row_with_nan_leaves_the_others_alone():
    """A short row's table may lead to a page of another's: 0 times NaN would be NaN."""
    layer, x, new = make(), inputs(2, 70), inputs(2, 60)
    x[0, 3] = float("nan")
    for absorb in True, False:
        cache = mla.PagedLatentCache(2, 256, 16, 8, dtype=torch.float64)
        layer(x, cache)
        cache.truncate([70, 5])
        got = layer(new, cache, absorb=absorb)  # three pages, and two: its third entry is page 0
        assert cache.pages[1, 2] == cache.held[0][0] == 0
        assert got[0].isnan().all() and not got[1].isnan().any()
        assert_close(got[1], layer(torch.cat((x[1, :5], new[1]))[None])[0, 5:])


@torch.no_grad()
def test_the_twin_gathers_no_more_pages_than_the_longest_row_has(monkeypatch):
    gathered, unpaged = [], mla.unpaged
    spy = lambda *args: gathered.append(unpaged(*args)) or gathered[-1]
    monkeypatch.setattr(mla, "unpaged", spy)
    layer, x = make(), inputs(2, 65)
    cache = mla.PagedLatentCache(2, 6400, 16, 8, dtype=torch.float64)
    layer(x, cache)
    layer(x[:, :1], cache)
    layer(x[:, :1], cache, absorb=False)
    assert [rows.shape[1] for rows in gathered] == [128, 128, 128]  # prefill reads it back, too
    assert gathered[-1][:, :67].any(-1).all() and not gathered[-1][:, 67:].any()


def test_decode_refuses_lengths_of_other_rows():
    q, entries = torch.randn(3, 2, 1, 6), torch.randn(3, 4, 6)
    with pytest.raises(ValueError, match=r"lengths \(3,\), one a row, got \(1,\)"):
        mla.mla_decode(q, entries, 4, 1.0, lengths=torch.tensor([4]))


def test_rows_share_pages_until_one_writes():
    cache = mla.PagedLatentCache(1, 256, 3, 2, pool=6)
    cache.append(torch.randn(1, 100, 3), torch.randn(1, 100, 2))
    cache.select(torch.tensor([0, 0, 0]))
    assert len(cache.free) == 4  # two pages for three rows
    before = contents(cache)
    cache.append(torch.randn(3, 0, 3), torch.randn(3, 0, 2))
    assert len(cache.free) == 4  # nothing written, nothing copied
    cache.append(torch.randn(3, 1, 3), torch.randn(3, 1, 2))
    assert len(cache.free) == 2  # the first is still shared, of the second two rows took a copy
    assert len({held[0] for held in cache.held}) == 1 < len({held[1] for held in cache.held}) == 3
    for mine, old in zip(contents(cache), before, strict=True):
        assert torch.equal(mine[:100], old)
    cache.select(torch.tensor([True, False, False]))
    assert len(cache.free) == 4 and cache.holders[cache.held[0][0]] == 1


def test_an_empty_pool_refuses_and_changes_nothing():
    cache = mla.PagedLatentCache(2, 256, 3, 2, pool=3)
    cache.append(torch.ones(2, 64, 3), torch.ones(2, 64, 2))
    state = copy.deepcopy((cache.held, cache.holders, cache.free, cache.sizes, cache.entries))
    with pytest.raises(ValueError, match="1 of 3 pages are free, the new tokens need 2"):
        cache.append(torch.zeros(2, 1, 3), torch.zeros(2, 1, 2))
    with pytest.raises(ValueError, match="256 slots: 64 used \\+ 193 new"):
        cache.append(torch.zeros(2, 193, 3), torch.zeros(2, 193, 2))
    after = cache.held, cache.holders, cache.free, cache.sizes
    assert after == state[:-1] and torch.equal(cache.entries, state[-1]) and cache.used == 64
    cache.truncate([64, 63])
    cache.append(torch.zeros(2, 1, 3), torch.zeros(2, 1, 2))


@pytest.mark.parametrize("absorb", [None, False, True], ids=["auto", "explicit", "absorbed"])
def test_a_layer_on_pages_is_the_layer(absorb):
    layer, x = make(q_lora_rank=12, rope_scaling=EQUAL), inputs(3, 150)
    caches = [
        kind(3, 160, 16, 8, dtype=torch.float64) for kind in (mla.LatentCache, mla.PagedLatentCache)
    ]
    for cache in caches:
        layer(x[:, :120], cache)
        cache.truncate([120, 3, 64])
        cache.select(torch.tensor([1, 0, 2, 2]))
    x = x[[1, 0, 2, 2], 120:]
    for part in x.split([1, 2, 10, 17], 1):
        want, got = (layer(part, cache, absorb) for cache in caches)
        assert torch.equal(got, want) or (got - want).abs().max() <= EXACT


@pytest.mark.parametrize(
    "q, entries, pages, message",
    [
        ((2, 3, 1, 7), (2, 9, 6), None, "got"),
        ((2, 3, 1, 7), (3, 9, 7), None, "got"),
        ((2, 3, 1, 7), (2, 64, 7), (3, 1), "pages True"),
    ],
    ids=["width", "batch", "rows"],
)
def test_mla_decode_refuses(q, entries, pages, message):
    pages = None if pages is None else torch.zeros(pages, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        mla.mla_decode(torch.randn(q), torch.randn(entries), 5, 1.0, pages=pages)
    with pytest.raises(ValueError, match="a mask or lengths"):
        mask, lengths = torch.ones(1, 1, 1, 9, dtype=torch.bool), torch.tensor([9, 9])
        mla.mla_decode(torch.randn(2, 3, 1, 7), torch.randn(2, 9, 7), 5, 1.0, mask, lengths)


# The kernels ---------------------------------------------------------------------------------

TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
INTERPRETED = """
import random
from importlib import import_module
import torch
mla = import_module("02_mla")
torch.manual_seed(0)
random.seed(0)


def compare(B, H, T, S, L, R, lengths=None, paged=False, dtype=torch.float32, config=None):
    lengths = [random.randint(T, S) for _ in range(B)] if lengths is None else lengths
    lengths = torch.tensor(lengths)
    q, entries = torch.randn(B, H, T, L + R).to(dtype), torch.randn(B, S, L + R).to(dtype)
    want = mla.mla_decode(q.double(), entries.double(), L, 0.2, lengths=lengths)
    for row, n in zip(entries, lengths, strict=True):
        row[n:] = float("nan")  # what is stale is never read
    pages = None
    if paged:
        each = -(-S // 64)
        pages = torch.randperm(B * each + 3)[: B * each].view(B, each).to(torch.int32)
        pool = torch.full((B * each + 3, 64, L + R), float("nan"), dtype=dtype)
        padded = torch.nn.functional.pad(entries, (0, 0, 0, 64 * each - S), value=float("nan"))
        pool[pages] = padded.unflatten(1, (each, 64))
        entries = pool
    config = config or mla.decode_config(H * T, L, entries.itemsize, (9, 0))
    got = mla.launch_decode(q, entries, L, 0.2, lengths, pages, config)
    assert got.dtype == dtype
    tol = 2e-6 if dtype == torch.float32 else 2e-3
    error = (got.double() - want).abs().max()
    assert error <= tol, (error, B, H, T, S, L, R, lengths, paged)
    return got
"""
CASES = {
    "shapes": """
compare(1, 1, 1, 1, 8, 8)
compare(2, 4, 1, 300, 16, 8, [300, 1])  # ten chunks; nine of the second row's are empty
compare(2, 4, 2, 300, 16, 8, [257, 2])  # the last chunk holds one slot, and the first query 0
compare(1, 2, 1, 2000, 8, 8, [1990])  # more than sixty
compare(2, 4, 2, 300, 16, 8, [300, 129], dtype=torch.float16)  # three, of 128 slots
compare(3, 20, 1, 200, 40, 12, paged=True)
compare(2, 17, 2, 129, 24, 8, [129, 128], paged=True)
for _ in range(8):
    L, R = random.randint(1, 70), 2 * random.randint(1, 10)
    T = random.randint(1, 3)
    compare(random.randint(1, 3), random.randint(1, 20), T, random.randint(T, 270), L, R,
            paged=random.random() < 0.5)
""",
    "every_config": """
# the tiles that GPUs run, forced onto the interpreter: fp16, for its products of bf16 are wrong
for capability in (8, 0), (8, 6), (9, 0), (10, 0), (12, 0):
    for rows in 16, 32, 64, 128:
        for paged in False, True:
            config = mla.decode_config(rows, 512, 2, capability, paged)
            compare(1, rows // 2, 2, 140, 512, 64, [140], paged, torch.float16, config)
compare(1, 128, 1, 70, 300, 24, [69], True, torch.float16)  # two parts, the second one narrower
""",
    "by_head": """
# absorption around the decode, as a GPU has it for a few rows; a head's part of wider projections
layer = mla.MultiHeadLatentAttention(48, 3, 40, 24, 8, 20)
for B, T in (1, 1), (1, 2), (2, 2), (4, 1):
    q = torch.randn(B, T, 3, 32).transpose(1, 2).split((24, 8), -1)
    entries, lengths = torch.randn(B, 9, 48), torch.randint(T, 10, (B,))
    for dtype, tol in (torch.float32, 1e-6), (torch.float16, 3e-3):
        given = [t.to(dtype) for t in (*q, entries)]
        mla.few_rows_on_gpu = lambda q: False
        want = layer.to(torch.float64).absorbed(*map(torch.Tensor.double, given), lengths)
        mla.few_rows_on_gpu = lambda q: True
        got = layer.to(dtype).absorbed(*given, lengths)
        assert got.dtype == dtype and got.shape == want.shape
        assert (got - want).abs().max() <= tol * want.abs().max()
        assert got.transpose(1, 2).is_contiguous()  # as the output projection wants it
""",
    "same_bits": """
torch.manual_seed(1)
first = compare(2, 4, 2, 300, 16, 8, [300, 200])
torch.manual_seed(1)
assert torch.equal(first, compare(2, 4, 2, 300, 16, 8, [300, 200]))
""",
}


@TRITON
@pytest.mark.parametrize("case", CASES)
def test_decode_kernels_in_the_interpreter(case):
    interpret(INTERPRETED + CASES[case])


TENSOR_CORE = {80: "mma.sync", 86: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}


SHIPPED = [
    pytest.param(capability, rows, page, marks=[pytest.mark.slow] * (page == 0 or rows in (32, 64)))
    for capability in TENSOR_CORE
    for rows in (16, 32, 64, 128)
    for page in (0, 64)
]


@TRITON
@pytest.mark.parametrize("capability, rows, page", SHIPPED)
def test_decode_compiles_without_a_spill(capability, rows, page):
    got = compile_decode(mla, capability, rows, page=page)
    assert got.spilled <= (128 if (capability, rows) == (90, 32) else 0)
    _, _, warps, _, _, each = mla.decode_config(rows, 512, 2, divmod(capability, 10), bool(page))
    assert each * got.shared <= 1024 * SHARED_LIMIT[capability]
    assert each * got.registers * 32 * warps <= 2**16
    assert ("mma.sync" if rows <= 32 else TENSOR_CORE[capability]) in got.ptx


@TRITON
@pytest.mark.parametrize("capability", TENSOR_CORE)
def test_by_head_compiles_without_a_spill(capability):
    for turned in False, True:
        assert compile_by_head(mla, capability, turned).spilled == 0


@TRITON
@pytest.mark.slow
@pytest.mark.parametrize("kind, L, R", [("fp32", 512, 64), ("fp16", 512, 64), ("bf16", 96, 24)])
@pytest.mark.parametrize("capability", TENSOR_CORE)
def test_other_widths_compile_without_a_spill(capability, kind, L, R):
    got = compile_decode(mla, capability, 64, kind, L, R)
    assert got.spilled == 0 and got.shared <= 1024 * SHARED_LIMIT[capability]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("H, T", [(16, 1), (16, 2), (128, 1), (128, 2), (4, 1)])
def test_decode_on_a_gpu(H, T, paged, dtype):
    kind = mla.PagedLatentCache if paged else mla.LatentCache
    cache = kind(3, 3000, 512, 64, "cuda", dtype)
    cache.append(*(torch.randn(3, 3000, w, device="cuda") for w in (512, 64)))
    cache.truncate([3000, 1, 1500])
    q = torch.randn(3, H, T, 576, device="cuda", dtype=dtype)
    lengths = cache.lengths.clamp(min=T)
    got = mla.mla_decode(q, cache.entries, 512, 0.1, lengths=lengths, pages=cache.pages)
    entries = cache.entries if not paged else mla.unpaged(cache.entries, cache.pages)[:, :3000]
    want = mla.mla_decode(q.double(), entries.double(), 512, 0.1, lengths=lengths)
    tol = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[dtype]
    assert (got.double() - want).abs().max() <= tol * (1 + want.abs().max())


def test_chunks_of_a_sequence():
    """64 sequences, 128 blocks each, on 264 places: in 4, all end in one round after 32 blocks. One
    sequence: two blocks each, and no more chunks than that. Of two rounds nothing is gained."""
    assert mla.split_count(64, 128, 264) == 4
    assert mla.split_count(1, 128, 132) == 64
    assert mla.split_count(132, 128, 132) == 1
    assert mla.split_count(1, 1, 132) == 1


# The kernel for Hopper ----------------------------------------------------------------------

GLUON = pytest.mark.skipif(mla.triton is None, reason="no Triton here")  # every one from 3.6 has it


@GLUON
@pytest.mark.parametrize("page, T", [(0, 2), (64, 1)], ids=["contiguous-two", "paged-one"])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_hopper_kernel_compiles_to_what_was_meant(kind, split, page, T):
    got = compile_hopper(mla, kind, split, page, T)
    assert got.spilled == 0 and got.shared <= 1024 * SHARED_LIMIT[90]
    count = lambda instruction: len(re.findall(rf"\b{re.escape(instruction)}", got.sass))
    assert count("HGMMA.64x64x16") == 576 // 16  # the scores of 64 slots
    assert count("HGMMA.64x256x16") == 2 * 64 // 16  # the sums of either group of warps
    assert count("UTMALDG") and count("USETMAXREG")


@GLUON
@pytest.mark.parametrize(
    "change",
    "none fp32 heads narrower scale GPU queries unaligned apart strided".split(),
)
def test_hopper_kernel_is_for_what_it_takes(change, monkeypatch):
    found = (9, 0) if change != "GPU" else (10, 0)
    monkeypatch.setattr(mla, "gpu", lambda device: (found, 132))
    dtype = torch.float32 if change == "fp32" else torch.bfloat16
    L, R = (512, 64) if change != "narrower" else (448, 64)
    H, T = {"heads": (48, 1), "queries": (32, 2)}.get(change, (64, 1))
    q, entries = torch.zeros(2, H, T, L + R, dtype=dtype), torch.zeros(2, 9, L + R, dtype=dtype)
    if change == "unaligned":
        entries = torch.zeros(entries.numel() + 1, dtype=dtype)[1:].view_as(entries)
    if change == "apart":  # rows of two sequences that are no rows of one list
        entries = entries.new_zeros(2, 9 * 576 + 8)[:, : 9 * 576].unflatten(1, (9, 576))
    if change == "strided":  # every second slot, and of a longer cache: TMA doesn't mind
        entries = entries.new_zeros(2, 40, 576)[:, 0:18:2]
    scale = -0.1 if change == "scale" else 0.1
    fits = change in ("none", "queries", "strided")
    assert mla.fits_hopper(q, entries, L, scale) == fits


RAGGED = {
    "many_chunks": (3, 128, 1, 3000, [3000, 1, 1500]),
    "two_queries": (2, 64, 2, 500, [500, 65]),
    "around_64": (5, 64, 1, 200, [1, 64, 65, 128, 200]),
    "one_step": (2, 128, 1, 64, [64, 3]),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("B, T", [(1, 1), (1, 2), (2, 2), (4, 1)])
def test_a_layer_decodes_a_few_rows_on_a_gpu(B, T, dtype, monkeypatch):
    """Absorption by a kernel, where no gradient is asked for, beside the products of batches."""
    layer = mla.MultiHeadLatentAttention(256, 8, 128, 64, 32, 64, q_lora_rank=96).cuda().to(dtype)
    x = torch.randn(B, 90 + T, 256, device="cuda", dtype=dtype)
    asked, by_head = [], mla.by_head
    monkeypatch.setattr(mla, "by_head", lambda *a: asked.append(1) or by_head(*a))
    found = []
    for few in True, False:
        cache = mla.LatentCache(B, 100, 128, 32, device="cuda", dtype=dtype)
        with torch.no_grad():
            layer(x[:, :90], cache)
            if not few:
                monkeypatch.setattr(mla, "few_rows_on_gpu", lambda q: False)
            found.append(layer(x[:, 90:], cache))
    assert len(asked) == 2
    tol = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert (found[0] - found[1]).abs().max() <= tol * found[1].abs().max()


@GLUON
@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="no Hopper",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "paged"])
@pytest.mark.parametrize("B, H, T, S, lengths", RAGGED.values(), ids=RAGGED)
def test_hopper_kernel_on_a_gpu(B, H, T, S, lengths, paged, dtype):
    """What is stale is NaN, in a sequence's last page too: none of it may leak."""
    cache = (mla.PagedLatentCache if paged else mla.LatentCache)(B, S, 512, 64, "cuda", dtype)
    cache.append(*(torch.randn(B, S, w, device="cuda") for w in (512, 64)))
    entries = cache.entries if not paged else mla.unpaged(cache.entries, cache.pages)[:, :S]
    lengths = torch.tensor(lengths, device="cuda").clamp(min=T)
    q = torch.randn(B, H, T, 576, device="cuda", dtype=dtype)
    want = mla.mla_decode(q.double(), entries.double(), 512, 0.1, lengths=lengths)
    for row, n in enumerate(lengths.tolist()):
        stale = torch.arange(n, 64 * cache.pages.shape[1] if paged else S, device="cuda")
        if paged:
            cache.entries[cache.pages[row, stale // 64], stale % 64] = float("nan")
        else:
            cache.entries[row, stale] = float("nan")
    assert mla.fits_hopper(q, cache.entries, 512, 0.1)
    got = mla.mla_decode(q, cache.entries, 512, 0.1, lengths=lengths, pages=cache.pages)
    tol = {torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    assert got.dtype == dtype
    assert (got.double() - want).abs().max() <= tol * (1 + want.abs().max())
