"""01_attention.py against PyTorch, transformers, and properties that need no reference."""

import copy
import importlib.util
import itertools
from importlib import import_module

import pytest
import torch
from ahead import SHARED_LIMIT, compile_flash, interpret
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

attn = import_module("01_attention")

EXACT = 1e-12  # float64: sums of at most a few hundred terms of size 1, each off by 1e-16
BLOCKED = [attn.online_softmax_attention, attn.flash_attention, attn.tiled_attention]
FUNCTIONS = [attn.attention, *BLOCKED]
HEADS = [(4, 4), (4, 2), (4, 1)]  # MHA, GQA, MQA


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_close(got, want, tol=EXACT):
    assert got.shape == want.shape and got.dtype == want.dtype
    error = (got.double() - want.double()).abs().max().item()
    assert error <= tol, f"error {error:.2e} > {tol:.0e}"


def qkv(H, G, T, S, D, V=None, B=2, dtype=torch.float64, grad=False):
    shapes = (B, H, T, D), (B, G, S, D), (B, G, S, V or D)
    return [torch.randn(*shape, dtype=dtype, requires_grad=grad) for shape in shapes]


def gqa(H=4, G=2, C=24, D=6, **kwargs):
    return attn.GroupedQueryAttention(C, H, G, D, **kwargs).double()


def cache_for(layer, B, room):
    weight = layer.k_proj.weight
    G = len(weight) // layer.head_dim
    return attn.KVCache(B, room, G, layer.head_dim, dtype=weight.dtype)


# The functions ------------------------------------------------------------------------------


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    "H, G, T, D, V",
    [(4, 4, 1, 8, 8), (4, 2, 37, 8, 8), (4, 1, 129, 8, 8), (4, 2, 300, 12, 8), (2, 1, 65, 8, 20)],
)
def test_function_is_sdpa(function, H, G, T, D, V, causal):
    """Forward and gradients; T is ragged against the block of 128, and V is not always D."""
    ours = qkv(H, G, T, T, D, V, grad=True)
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    got = function(*ours, causal)
    want = F.scaled_dot_product_attention(*theirs, is_causal=causal, enable_gqa=True)
    assert_close(got, want)
    upstream = torch.randn_like(want)
    got.backward(upstream)
    want.backward(upstream)
    for mine, other in zip(ours, theirs, strict=True):
        assert_close(mine.grad, other.grad)


@pytest.mark.parametrize("function", [*FUNCTIONS, attn.torch_attention], ids=lambda f: f.__name__)
@pytest.mark.parametrize("T, S", [(1, 150), (7, 150), (130, 150), (149, 150)])
def test_causal_queries_are_the_last_positions(function, T, S):
    q, k, v = qkv(4, 2, S, S, 8)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[:, :, S - T :]
    assert_close(function(q[:, :, S - T :], k, v), want)


@pytest.mark.parametrize("function", [*FUNCTIONS, attn.torch_attention], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    "shape", [(2, 4, 5, 300), (2, 1, 5, 300), (5, 300), (2, 1, 1, 300)], ids=str
)
def test_mask_and_scale_are_those_of_sdpa(function, shape):
    q, k, v = qkv(4, 2, 5, 300, 8)
    mask = torch.rand(shape) < 0.3
    mask[..., :128] = False  # the first block of keys is hidden whole: no −inf − −inf
    want = F.scaled_dot_product_attention(q, k, v, mask, scale=0.7, enable_gqa=True)
    assert_close(function(q, k, v, scale=0.7, mask=mask), want)


@pytest.mark.parametrize("function", BLOCKED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("block", [1, 3, 16, 64])
def test_any_block_size(function, block):
    q, k, v = qkv(4, 2, 29, 29, 8)
    assert_close(function(q, k, v, block=block), attn.attention(q, k, v))


@pytest.mark.parametrize("function", BLOCKED, ids=lambda f: f.__name__)
def test_large_scores_do_not_overflow(function):
    q, k, v = qkv(2, 2, 9, 9, 8, dtype=torch.float32)
    q = 1e4 * q  # e^score is beyond fp32, and the maximum moves from block to block
    got = function(q, k, v, block=2)
    # the gaps are as large as the scores: one weight is 1, and what is left is fp32 rounding
    assert_close(got, attn.attention(q.double(), k.double(), v.double()).float(), 1e-6)


@pytest.mark.parametrize("function", BLOCKED[:2], ids=lambda f: f.__name__)  # tiled: in bf16
def test_bf16_sums_in_fp32(function):
    q, k, v = qkv(2, 1, 600, 600, 16, dtype=torch.bfloat16)
    got = function(q, k, v, block=4)
    want = attn.attention(q.double(), k.double(), v.double())
    # only the rounding of the result is left: half a step of 8 bits, relative
    assert got.dtype == torch.bfloat16
    assert ((got.double() - want).abs() <= 2**-8 * want.abs() + 1e-6).all()


@pytest.mark.parametrize("function", BLOCKED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("B, T", [(0, 5), (2, 0), (0, 0)])
def test_nothing_is_attended_to_by_nobody(function, B, T):
    q, k, v = qkv(4, 2, T, 5, 8, 6, B=B, grad=True)
    out = function(q, k, v)
    assert out.shape == (B, 4, T, 6)
    out.sum().backward()
    assert q.grad.shape == q.shape and not k.grad.any() and not v.grad.any()


@pytest.mark.slow
def test_tiles_are_compiled():
    """Lengths that vary, as symbols; with gradients and without."""
    compiled = torch.compile(attn.tiled_attention, dynamic=True, backend="eager")
    for T in 5, 9:
        q, k, v = qkv(4, 2, T, T, 8, 6, grad=True)
        want = attn.attention(q, k, v)
        with torch.no_grad():
            assert_close(compiled(q, k, v), want)
        got, true = (torch.autograd.grad(f(q, k, v).sum(), q) for f in (compiled, attn.attention))
        assert_close(got[0], true[0])


def test_a_second_derivative_is_refused():
    """Rather than wrong: backward's own steps are not recorded. A sum's gradient is a constant, so
    nothing but q, k and v would tell that this one isn't."""
    q, k, v = qkv(2, 1, 5, 5, 4, grad=True)
    for loss in (torch.sum, lambda out: out.square().sum()):
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(loss(attn.tiled_attention(q, k, v)), [q], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.functional.hessian(lambda k: attn.tiled_attention(q, k, v).sum(), k)


def test_a_mask_that_changes_before_backward_is_noticed(monkeypatch):
    monkeypatch.setattr(attn, "KEPT_WEIGHTS", 0)  # weights are made again, from the mask
    q, k, v = qkv(2, 1, 5, 5, 4, grad=True)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    out = attn.tiled_attention(q, k, v, mask=mask)
    mask.fill_(True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_cache_of_other_rows_is_refused():
    layer, cache = attn.GroupedQueryAttention(32, 4, 2), attn.KVCache(3, 9, 2, 8)
    with pytest.raises(ValueError, match="cache has 3 rows, x has 2"):
        layer(torch.randn(2, 1, 32), cache)
    with pytest.raises(ValueError, match="cannot share 0"):
        attn.GroupedQueryAttention(32, 4, 0)


@pytest.mark.parametrize("function", BLOCKED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("H, G", HEADS)
def test_gradcheck(function, H, G):
    inputs = qkv(H, G, 5, 5, 3, 2, B=1, grad=True)
    assert torch.autograd.gradcheck(lambda *t: function(*t, block=2), inputs)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_tiles_that_are_kept_or_made_again_give_the_same_bits(masked, dtype, monkeypatch):
    """5 tiles of 8 queries, the last one short; their weights are kept, beside q, k, v, mask."""
    inputs = qkv(4, 2, 35, 35, 8, 6, dtype=dtype, grad=True)
    mask = torch.rand(2, 1, 35, 35) < 0.5 if masked else None
    found = []
    for limit, saved in (2 * 4 * 35 * 35 * dtype.itemsize, 4 + 5), (2 * 4 * 35 * 35, 4):
        monkeypatch.setattr(attn, "KEPT_WEIGHTS", limit)
        out = attn.tiled_attention(*inputs, mask=mask, block=8)
        assert len(out.grad_fn.saved_tensors) == saved
        found.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
    for kept, again in zip(*found, strict=True):
        assert kept.abs().max() > 0 and torch.equal(kept, again)


# RoPE ---------------------------------------------------------------------------------------


def rotate(x, position, interleaved=True, theta=10000.0):
    angle = position * attn.rope_frequencies(x.shape[-1], theta).double()
    return attn.apply_rope(x[None], angle.cos(), angle.sin(), interleaved)[0]


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(0, 4000),
    n=st.integers(0, 4000),
    shift=st.integers(-4000, 4000),
    pairs=st.integers(1, 8),
    interleaved=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_rope_sees_the_distance_alone(m, n, shift, pairs, interleaved, seed):
    q, k = torch.randn(
        2, 2 * pairs, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    here = rotate(q, m, interleaved) @ rotate(k, n, interleaved)
    there = rotate(q, m + shift, interleaved) @ rotate(k, n + shift, interleaved)
    # an angle of 8000 carries 1e-12; norms of 16 channels multiply it by less than 100
    assert abs(here - there) < 1e-10
    assert abs(rotate(q, m, interleaved).norm() - q.norm()) < EXACT


@pytest.mark.parametrize("interleaved, pair", [(True, (2, 3)), (False, (1, 4))])
def test_rope_turns_a_pair_counter_clockwise(interleaved, pair):
    """By hand: channel pair 1 of 3 at position 5 turns by 5 · 10000^(−2/6)."""
    first = torch.zeros(6, dtype=torch.float64)
    first[pair[0]] = 1.0
    angle = torch.tensor(5 * 10000 ** (-1 / 3), dtype=torch.float64)
    want = torch.zeros(6, dtype=torch.float64)
    want[pair[0]], want[pair[1]] = angle.cos(), angle.sin()
    assert_close(rotate(first, 5, interleaved), want, 1e-6)  # frequencies are fp32


@pytest.mark.parametrize("dim", [2, 8, 64])
def test_layouts_differ_by_the_permutation(dim):
    q, k = torch.randn(2, dim, dtype=torch.float64)
    order = attn.half_split_order(dim)
    assert_close(rotate(q, 9)[order], rotate(q[order], 9, False))
    product = rotate(q[order], 9, False) @ rotate(k[order], 4, False)
    assert_close(rotate(q, 9) @ rotate(k, 4), product)
    assert torch.equal(q[order][order.argsort()], q)


def test_permuted_weights_change_the_layout_of_a_layer():
    layer, x = gqa(), torch.randn(2, 9, 24, dtype=torch.float64)
    other = gqa(interleaved=False)
    other.load_state_dict(layer.state_dict())
    assert (other(x) - layer(x)).abs().max() > 1e-3  # the layout matters
    for proj in (other.q_proj, other.k_proj):
        rows = proj.weight.data.unflatten(0, (-1, 6))  # (heads, D, C)
        proj.weight.data = rows[:, attn.half_split_order(6)].flatten(0, 1)
    assert_close(other(x), layer(x))


# The layer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("B, T, C, H", [(1, 1, 8, 2), (2, 17, 24, 4), (3, 33, 40, 5)])
def test_layer_is_multihead_attention(B, T, C, H):
    layer = attn.GroupedQueryAttention(C, H, H, rope_theta=None).double()
    rival = nn.MultiheadAttention(C, H, bias=False, batch_first=True).double()
    projections = (layer.q_proj, layer.k_proj, layer.v_proj)
    rival.in_proj_weight.data = torch.cat([proj.weight for proj in projections]).detach()
    rival.out_proj.weight.data = layer.o_proj.weight.detach().clone()
    x = torch.randn(B, T, C, dtype=torch.float64)
    hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
    assert_close(layer(x), rival(x, x, x, attn_mask=hidden, need_weights=False)[0])


@pytest.mark.parametrize("H, G, D", [(4, 4, 8), (4, 2, 8), (8, 1, 4), (6, 3, 16)])
def test_layer_is_llama_attention(H, G, D):
    """Same weights, half-split RoPE; the output and every gradient."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    B, T, C, theta = 2, 19, 48, 500.0
    config = llama.LlamaConfig(
        hidden_size=C,
        num_attention_heads=H,
        num_key_value_heads=G,
        head_dim=D,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        attn_implementation="eager",
    )
    theirs = llama.LlamaAttention(config, layer_idx=0).double()
    ours = attn.GroupedQueryAttention(C, H, G, D, theta, interleaved=False).double()
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.frequencies, llama.LlamaRotaryEmbedding(config).inv_freq)

    # transformers rounds cos and sin to fp32; given in float64, the comparison is exact
    angles = torch.outer(torch.arange(T), ours.frequencies.double()).repeat(1, 2)[None]
    future = torch.full((T, T), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    x = torch.randn(B, T, C, dtype=torch.float64, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    got, (want, _) = ours(x), theirs(x2, (angles.cos(), angles.sin()), future)
    # its softmax runs in fp32 even for float64 weights: 24 bits, on outputs of size 1
    assert_close(got, want, 1e-6)
    upstream = torch.randn_like(got)
    got.backward(upstream)
    want.backward(upstream)
    assert_close(x.grad, x2.grad, 1e-5)  # sums of 100 such products
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, theirs.get_parameter(name).grad, 1e-5)


@pytest.mark.parametrize("H, G", HEADS)
def test_layer_gradcheck(H, G):
    layer = gqa(H, G, C=6, D=4)
    x = torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True)
    names, weights = zip(*layer.named_parameters(), strict=True)
    assert len(names) == 4

    def call(x, *weights):
        return functional_call(layer, dict(zip(names, weights, strict=True)), (x,))

    assert torch.autograd.gradcheck(call, (x, *weights))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_every_function_fits_the_seam(function):
    layer = gqa()
    other = gqa(attention=function)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 12, 24, dtype=torch.float64)
    assert_close(other(x), layer(x))
    cache = cache_for(other, 2, 12)
    parts = [other(part, cache) for part in x.split([5, 1, 6], dim=1)]
    assert_close(torch.cat(parts, 1), layer(x))


def test_seam_is_called_and_sees_mask_only_where_needed():
    calls = []

    def spy(q, k, v, causal, scale, mask):
        calls.append((causal, mask is None, scale))
        return attn.torch_attention(q, k, v, causal, scale, mask)

    layer = gqa(attention=spy)
    x, cache = torch.randn(2, 3, 24, dtype=torch.float64), cache_for(layer, 2, 6)
    layer(x)
    layer(x, cache)  # all rows empty: the plain causal pass
    layer(x, cache)
    assert calls == [(True, True, 6**-0.5), (True, True, 6**-0.5), (False, False, 6**-0.5)]


@pytest.mark.parametrize("theta", [10000.0, None], ids=["rope", "no_rope"])
def test_state_is_four_weights(theta):
    names = set(attn.GroupedQueryAttention(24, 4, 2, rope_theta=theta).state_dict())
    assert names == {f"{name}_proj.weight" for name in "qkvo"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_frequencies_stay_fp32(dtype):
    layer = attn.GroupedQueryAttention(64, 2, 1).to(dtype)
    want = attn.rope_frequencies(32)
    assert layer.q_proj.weight.dtype == dtype
    assert layer.frequencies.dtype == torch.float32 and torch.equal(layer.frequencies, want)
    assert torch.equal(copy.deepcopy(layer).frequencies, want)
    cos, sin = layer.cos_sin(torch.tensor([1000]), dtype)
    angle = 1000 * want.double()
    # an fp32 angle of 1000 is off by 2^-15 (half a step of 2^-14); bf16 anywhere would show 2^-9
    for got, exact in (cos, angle.cos()), (sin, angle.sin()):
        assert_close(got, exact.float()[None], 2**-14)
    assert layer(torch.randn(1, 5, 64, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("how", ["to_empty", "assign"])
def test_frequencies_survive_the_meta_device(how):
    source = attn.GroupedQueryAttention(64, 2, 1)
    with torch.device("meta"):
        layer = attn.GroupedQueryAttention(64, 2, 1)
    if how == "to_empty":
        layer.to_empty(device="cpu")
    layer.load_state_dict(source.state_dict(), assign=how == "assign")
    x = torch.randn(1, 5, 64)
    assert torch.equal(layer(x), source(x))


def test_bf16_layer_is_near_the_float64_layer():
    layer = attn.GroupedQueryAttention(64, 4, 2).to(torch.bfloat16)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(2, 300, 64, dtype=torch.bfloat16)
    error = (layer(x).double() - exact(x.double())).abs().max()
    # four roundings in a row (projection, RoPE, attention, projection), 2^-9 each, outputs below 1
    assert error <= 4 * 2**-9


# The cache ----------------------------------------------------------------------------------


def splits(T):
    """All 2^(T−1) ways to cut T tokens into consecutive parts."""
    for cuts in itertools.product([False, True], repeat=T - 1):
        edges = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), T]
        yield [b - a for a, b in itertools.pairwise(edges)]


@torch.no_grad()
@pytest.mark.parametrize("H, G", HEADS)
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "half_split"])
def test_every_split_is_one_pass(H, G, interleaved):
    T, layer = 7, gqa(H, G, interleaved=interleaved)
    x = torch.randn(2, T, 24, dtype=torch.float64)
    want = layer(x)
    for sizes in splits(T):
        cache = cache_for(layer, 2, T)
        got = torch.cat([layer(part, cache) for part in x.split(sizes, dim=1)], dim=1)
        assert_close(got, want)
        assert cache.lengths.tolist() == [T, T] and cache.used == T


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[1, 7, 4], [6, 2, 2], [7, 7, 7], [0, 3, 1]], ids=str)
@pytest.mark.parametrize("G", [1, 2, 4])
def test_unequal_prompts_are_each_row_alone(lengths, G):
    layer, total = gqa(4, G), 12
    x = torch.randn(3, total, 24, dtype=torch.float64)
    prompts = torch.full((3, 7, 24), 5.0, dtype=torch.float64)  # 5.0: padding that would show
    for row, n in enumerate(lengths):
        prompts[row, :n] = x[row, :n]
    cache = cache_for(layer, 3, total)
    prefill = layer(prompts, cache)
    cache.truncate(torch.tensor(lengths))
    assert cache.used == max(lengths)
    steps = [
        [x[row, n + i : n + i + t] for row, n in enumerate(lengths)] for i, t in [(0, 1), (1, 3)]
    ]
    got = torch.cat([layer(torch.stack(step), cache) for step in steps], dim=1)  # one, then three
    for row, n in enumerate(lengths):
        alone = layer(x[row : row + 1, : n + 4])[0]
        assert_close(torch.cat([prefill[row, :n], got[row]]), alone)
    assert cache.lengths.tolist() == [n + 4 for n in lengths]


@torch.no_grad()
@pytest.mark.parametrize("rows", [[2, 0], [1, 1, 0, 2], [True, False, True]], ids=str)
def test_selected_rows_go_on_as_if_alone(rows):
    layer, x = gqa(), torch.randn(3, 5, 24, dtype=torch.float64)
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
def test_rows_that_go_on_have_the_room_of_their_own_longest():
    cache = attn.KVCache(2, 10, 1, 4)
    cache.append(*torch.randn(2, 2, 1, 8, 4))
    cache.truncate([8, 2])
    cache.select(torch.tensor([1]))
    k, _ = cache.append(*torch.randn(2, 1, 1, 3, 4))
    assert k.shape[2] == cache.used == 5
    cache.select(torch.tensor([], dtype=torch.int64))
    cache.truncate(0)
    assert cache.used == 0


def test_a_cache_takes_keys_and_values_of_its_own_dtype():
    cache, k = attn.KVCache(1, 5, 2, 6), torch.zeros(1, 2, 1, 6)
    for pair in (k, k.double()), (k.double(), k), (k, k[..., :5]):
        with pytest.raises(ValueError, match="cache takes two of"):
            cache.append(*pair)


def test_an_emptied_cache_trains_again():
    layer, cache = gqa(), attn.KVCache(2, 5, 2, 6, dtype=torch.float64)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    for _ in range(2):
        layer.zero_grad()
        layer(x, cache).sum().backward()
        cache.truncate(0)
    got = layer.k_proj.weight.grad
    [want] = torch.autograd.grad(layer(x).sum(), [layer.k_proj.weight])
    assert_close(got, want)


@pytest.mark.parametrize("kept", [[5, 5], [3, 5], [0, 2], 4, 0], ids=str)
def test_truncate_leaves_no_trace(kept):
    """A rejected draft, huge on purpose: the same bits as a cache that never saw it."""
    layer = gqa()
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    new = torch.randn(2, 3, 24, dtype=torch.float64)
    drafted, clean = cache_for(layer, 2, 12), cache_for(layer, 2, 12)
    for cache in (drafted, clean):
        layer(x, cache)
    before = drafted.lengths
    layer(torch.full((2, 4, 24), 1e6, dtype=torch.float64), drafted)
    assert before.tolist() == [5, 5]  # the tensor that the caller kept
    drafted.truncate(before)
    for cache in (drafted, clean):
        cache.truncate(kept)
    assert torch.equal(drafted.lengths, clean.lengths) and drafted.used == clean.used
    assert torch.equal(layer(new, drafted), layer(new, clean))
    assert torch.equal(drafted.lengths, clean.lengths) and drafted.used == clean.used


def test_append_returns_views_and_does_not_keep_the_callers_lengths():
    cache = attn.KVCache(2, 8, 1, 4)
    k, v = cache.append(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4))
    assert k.shape == (2, 1, 3, 4) and k.data_ptr() == cache.k.data_ptr()
    assert v.data_ptr() == cache.v.data_ptr()
    lengths = torch.tensor([1, 2])
    cache.truncate(lengths)
    cache.append(torch.ones(2, 1, 1, 4), torch.ones(2, 1, 1, 4))
    lengths += 5
    assert cache.lengths.tolist() == [2, 3] and cache.used == 3


def test_gradients_pass_through_a_prefilled_cache():
    layer, x = gqa(), torch.randn(2, 6, 24, dtype=torch.float64)
    layer(x).square().sum().backward()
    want = {name: p.grad.clone() for name, p in layer.named_parameters()}
    layer.zero_grad()
    layer(x, cache_for(layer, 2, 8)).square().sum().backward()
    for name, p in layer.named_parameters():
        assert_close(p.grad, want[name])


# Bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, numbers",
    [
        (dict(hidden_size=30, num_attention_heads=4, num_key_value_heads=4), "30.*4"),
        (dict(hidden_size=32, num_attention_heads=8, num_key_value_heads=3), "8.*3"),
        (dict(hidden_size=32, num_attention_heads=2, num_key_value_heads=4), "2.*4"),
        (dict(hidden_size=12, num_attention_heads=4, num_key_value_heads=2), "3 is odd"),
    ],
    ids=["hidden_not_divisible", "groups_not_divisible", "more_groups_than_heads", "odd_head_dim"],
)
def test_layer_refuses(arguments, numbers):
    with pytest.raises(ValueError, match=numbers):
        attn.GroupedQueryAttention(**arguments)


def test_odd_head_dim_is_fine_without_rope():
    layer = attn.GroupedQueryAttention(12, 4, 2, rope_theta=None)
    assert layer(torch.randn(1, 5, 12)).shape == (1, 5, 12)


def test_head_dim_need_not_divide_hidden_size():
    assert gqa(4, 2, C=30, D=6)(torch.randn(1, 5, 30, dtype=torch.float64)).shape == (1, 5, 30)


def test_cache_overflow_changes_nothing():
    layer = gqa()
    x, cache = torch.randn(2, 5, 24, dtype=torch.float64), cache_for(layer, 2, 8)
    layer(x, cache)
    cache.truncate([5, 1])
    stored = cache.k.clone()
    with pytest.raises(ValueError, match="8 slots: 5 used \\+ 4 new"):
        layer(x[:, :4], cache)
    assert cache.lengths.tolist() == [5, 1] and cache.used == 5 and torch.equal(cache.k, stored)
    assert layer(x[:, :3], cache).shape == (2, 3, 24)  # exactly full is allowed


@pytest.mark.parametrize("lengths", [[4, 3], [-1, 2], 4], ids=str)
def test_truncate_refuses(lengths):
    cache = attn.KVCache(2, 8, 1, 4)
    cache.append(torch.ones(2, 1, 3, 4), torch.ones(2, 1, 3, 4))
    with pytest.raises(ValueError, match=r"\[3, 3\]"):
        cache.truncate(lengths)
    assert cache.lengths.tolist() == [3, 3] and cache.used == 3


@pytest.mark.parametrize(
    "k, v",
    [
        (torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4)),
        (torch.ones(2, 2, 3, 4), torch.ones(2, 2, 3, 4)),
        (torch.ones(2, 1, 3, 4), torch.ones(2, 1, 1, 4)),
        (torch.ones(2, 1, 3, 4).double(), torch.ones(2, 1, 3, 4).double()),
    ],
    ids=["batch", "heads", "v_shorter", "dtype"],
)
def test_append_refuses(k, v):
    """Indexing would broadcast the first three into the slots without a word."""
    cache = attn.KVCache(2, 8, 1, 4)
    with pytest.raises(ValueError, match=r"cache takes two of \(2, 1, T, 4\)"):
        cache.append(k, v)
    assert cache.used == 0


@pytest.mark.parametrize(
    "shapes",
    [
        [(1, 4, 5, 8), (1, 3, 5, 8), (1, 3, 5, 8)],
        [(1, 4, 5, 8), (1, 2, 5, 6), (1, 2, 5, 8)],
        [(1, 4, 5, 8), (1, 2, 5, 8), (1, 2, 1, 8)],
        [(1, 4, 6, 8), (1, 2, 5, 8), (1, 2, 5, 8)],
    ],
    ids=["heads", "widths", "v_shorter", "more_queries_than_keys"],
)
@pytest.mark.parametrize("function", BLOCKED[1:], ids=lambda f: f.__name__)
def test_function_refuses(function, shapes):
    with pytest.raises(ValueError, match="want .* got|6 queries are more than 5 keys"):
        function(*(torch.randn(shape) for shape in shapes))


# The kernels ---------------------------------------------------------------------------------

TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no Triton here")
INTERPRETED = """
import random
from importlib import import_module
import torch
attn = import_module("01_attention")
torch.manual_seed(0)
random.seed(0)


def compare(B, H, G, T, S, D, V, causal, dtype=torch.float32, scale=None):
    # views of another layout, as MLA's are: heads behind tokens
    shapes = (B, T, H, D), (B, S, G, D), (B, S, G, V)
    q, k, v = (torch.randn(shape).to(dtype).transpose(1, 2).requires_grad_() for shape in shapes)
    scale = D**-0.5 if scale is None else scale
    out = attn._FlashAttention.apply(q, k, v, causal, scale)
    do = torch.randn(B, T, H, V).to(dtype).transpose(1, 2)
    got = out, *torch.autograd.grad(out, (q, k, v), do)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    want = attn.attention(*wide, causal, scale)
    want = want, *torch.autograd.grad(want, wide, do.double())
    tol = 2e-6 if dtype == torch.float32 else 2e-3  # relative to sums of order 1 to 10
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        error = (a.double() - b).abs().max() / (1 + b.abs().max())
        assert a.dtype == dtype and error <= tol, (name, error, (B, H, G, T, S, D, V, causal))
"""
CASES = {
    "shapes": """
compare(1, 1, 1, 1, 1, 8, 8, True)
compare(2, 4, 2, 33, 50, 24, 20, True)
compare(1, 4, 4, 17, 70, 192, 128, True)
compare(1, 2, 1, 40, 40, 48, 32, False)
compare(2, 3, 1, 1, 37, 16, 16, True)
compare(1, 2, 2, 50, 20, 16, 8, False)
compare(1, 2, 2, 40, 40, 16, 16, True, scale=3.0)
compare(1, 1, 1, 20, 20, 256, 256, True)
compare(1, 1, 1, 150, 200, 16, 16, True)  # several tiles of keys, and some of queries see none
for _ in range(6):
    G, T = random.randint(1, 2), random.randint(1, 60)
    S = T + random.randint(0, 40)
    D, V = random.randint(1, 70), random.randint(1, 70)
    compare(1, G * random.randint(1, 3), G, T, S, D, V, random.random() < 0.7)
""",
    "every_config": """
# the tiles that GPUs run, forced onto the interpreter: fp16, for its products of bf16 are wrong
for capability in (8, 0), (9, 0), (10, 0), (12, 0):
    for D, V in (64, 64), (128, 128), (192, 128):
        configs = attn.flash_configs(D, V, 2, capability)
        attn.flash_configs, real = (lambda *_: configs), attn.flash_configs
        compare(1, 2, 1, 70, 90, D, V, True, torch.float16)
        attn.flash_configs = real
""",
    "weights_of_keys_past_the_last_may_be_infinite": """
for dtype, size in (torch.float16, 4.0), (torch.float32, 12.0):
    q, k = torch.full((1, 1, 5, 16), size), torch.full((1, 1, 20, 16), -size)
    q, k = ((x + 0.1 * torch.randn(x.shape)).to(dtype).requires_grad_() for x in (q, k))
    v = torch.randn(1, 1, 20, 16).to(dtype).requires_grad_()
    out = attn._FlashAttention.apply(q, k, v, False, 1.0)
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert dq.isfinite().all() and dk.isfinite().all() and dv.isfinite().all()
""",
    "same_bits": """
q, k, v = (torch.randn(1, 2, 40, 16).requires_grad_() for _ in "qkv")
runs = []
for _ in range(2):
    out = attn._FlashAttention.apply(q, k, v, True, 0.25)
    runs.append([out, *torch.autograd.grad(out.square().sum(), (q, k, v))])
assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
""",
}


@TRITON
@pytest.mark.parametrize("case", CASES)
def test_flash_kernels_in_the_interpreter(case):
    """Output and gradients against the oracle in float64."""
    interpret(INTERPRETED + CASES[case])


TENSOR_CORE = {80: "mma.sync", 86: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
COMPILED = [
    pytest.param(capability, D, V, kind, causal, marks=[pytest.mark.slow] * slow)
    for capability in TENSOR_CORE
    for D, V, kind, causal, slow in (
        (128, 128, "bf16", True, False), (192, 128, "bf16", True, False),
        (192, 128, "bf16", False, True), (64, 64, "fp16", True, True), (48, 32, "bf16", True, True),
        (256, 256, "bf16", True, True), (128, 128, "fp32", True, True),
        (192, 128, "fp32", True, True),
    )
]  # fmt: skip


@TRITON
@pytest.mark.parametrize("which", ["forward", "keys", "queries"])
@pytest.mark.parametrize("capability, D, V, kind, causal", COMPILED)
def test_flash_compiles_without_a_spill(capability, D, V, kind, causal, which):
    # on an H200 (benchmarks/tiles.py) keys take 1.10 ms with 4 warps that spill; without, 1.30
    allowed = 184 if capability == 90 and which == "keys" and kind != "fp32" and D <= 192 else 0
    for S in (4096, 16384) if (capability, which) == (90, "forward") else (4096,):
        got = compile_flash(attn, capability, which, D, V, kind, causal, S)
        assert got.spilled <= allowed
        assert got.shared <= 1024 * SHARED_LIMIT[capability]
        if kind != "fp32":  # tiles of 32 rows, where larger ones spill, take the older instruction
            older = max(D, V) > 192 or capability == 100 and which == "keys"
            assert ("mma.sync" if older else TENSOR_CORE[capability]) in got.ptx


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("D, V", [(64, 64), (128, 128), (192, 128)])
@pytest.mark.parametrize("T, S, causal", [(300, 300, True), (1, 513, True), (130, 200, False)])
def test_flash_on_a_gpu(T, S, causal, D, V, dtype):
    shapes = (2, T, 4, D), (2, S, 2, D), (2, S, 2, V)
    q, k, v = (
        torch.randn(shape, device="cuda", dtype=dtype).transpose(1, 2).requires_grad_()
        for shape in shapes
    )
    out = attn.flash_attention(q, k, v, causal)
    do = torch.randn_like(out)
    got = out, *torch.autograd.grad(out, (q, k, v), do)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    want = attn.attention(*wide, causal)
    want = want, *torch.autograd.grad(want, wide, do.double())
    tol = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-5}[dtype]
    for a, b in zip(got, want, strict=True):
        assert (a.double() - b).abs().max() <= tol * (1 + b.abs().max())


@pytest.mark.parametrize("function", [attn.flash_attention, attn.tiled_attention])
def test_autocast_leaves_float64_alone(function):
    """As nn.Linear's: one that is checked in float64 under autocast would otherwise be of bf16."""
    q, k, v = torch.randn(3, 1, 2, 9, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        got = function(q, k, v)
        assert function(q.float(), k.float(), v.float()).dtype == torch.bfloat16
    assert got.dtype == torch.float64 and torch.equal(got, function(q, k, v))


@pytest.mark.parametrize("attention", [attn.tiled_attention, attn.online_softmax_attention])
def test_a_query_that_sees_nothing_gets_nothing(attention):
    """As in SDPA: padding on the left must not make the gradients of other rows NaN."""
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 2, 2, 5, 8, dtype=torch.float64))
    mask = torch.ones(5, 5, dtype=torch.bool).tril().repeat(2, 1, 1, 1)
    mask[1, :, :, :3] = False
    want = F.scaled_dot_product_attention(q, k, v, mask)
    got = attention(q, k, v, mask=mask)
    assert (got - want).abs().max() <= 1e-12 and not got[1, :, :3].any()
    pairs = (torch.autograd.grad((out**2).sum(), (q, k, v)) for out in (got, want))
    for mine, other in zip(*pairs, strict=True):
        assert (mine - other).abs().max() <= 1e-12
