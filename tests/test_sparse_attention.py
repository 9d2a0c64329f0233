"""Chapter 10: the indexer and its attention against loops, 02's layer, transformers' V3.2."""

import copy
import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

chapter = import_module("10_sparse_attention")
base, mla = chapter.base, chapter.mla
released = import_module("08_checkpoints")
transformers = pytest.importorskip("transformers")
ROOT = Path(__file__).resolve().parents[1]
TINY = chapter.SparseConfig(
    vocab_size=320, hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
    num_hidden_layers=3, first_k_dense_replace=1, num_attention_heads=4, q_lora_rank=24,
    kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12, n_routed_experts=8,
    num_experts_per_tok=2, n_group=2, topk_group=1, max_position_embeddings=256,
    initializer_range=0.1, index_n_heads=16, index_head_dim=20, index_topk=7,
)  # fmt: skip
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
YARN |= {"mscale": 1.0, "mscale_all_dim": 1.0}


def model_of(config=TINY, seed=0):
    torch.manual_seed(seed)
    model = chapter.SparseDeepSeek(config).eval()
    for attention in model.attentions():  # gains and a bias that are not 1 and 0
        torch.nn.init.normal_(attention.indexer.k_norm.weight, 1.0, 0.2)
        torch.nn.init.normal_(attention.indexer.k_norm.bias, 0.0, 0.2)
    return model


def seeded():
    return torch.Generator().manual_seed(2)


def tokens_of(*shape, seed=1):
    return torch.randint(TINY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def layer_of(index_topk=6, dtype=torch.float64, **sizes):
    torch.manual_seed(0)
    sizes = chapter.SIZES | chapter.INDEX | {"index_topk": index_topk} | sizes
    return chapter.SparseLatentAttention(**sizes).to(dtype)


def scores_of(layer, x, q_low, cos, sin):
    queries, keys = layer.indexer.queries(x, q_low, cos, sin), layer.indexer.keys(x, cos, sin)
    return chapter.index_scores(*queries, keys)


# --- the layer -------------------------------------------------------------------------------


@pytest.mark.parametrize("J, T, S", [(1, 1, 1), (3, 5, 9), (4, 1, 300), (2, 7, 0)])
def test_scores_are_equation_1(J, T, S):
    torch.manual_seed(0)
    q, w, k = (torch.randn(2, *s, dtype=torch.float64) for s in ((J, T, 6), (T, J), (S, 6)))
    got = chapter.index_scores(q, w, k)
    assert got.shape == (2, T, S)
    for row, args in zip(got, zip(q, w, k, strict=True), strict=True):
        assert torch.allclose(row, chapter.scores_reference(*args), rtol=0, atol=1e-12)


def test_scores_come_in_parts_of_the_queries(monkeypatch):
    torch.manual_seed(0)
    q, w, k = torch.randn(2, 64, 3, 2), torch.randn(2, 3, 64), torch.randn(2, 100, 2)
    monkeypatch.setattr(chapter, "AT_A_TIME", 2 * 2 * 64 * 100 + 1)
    seen = []
    real = torch.Tensor.relu
    monkeypatch.setattr(torch.Tensor, "relu", lambda t: seen.append(t.shape) or real(t))
    got = chapter.index_scores(q, w, k)
    assert seen == [(2, 100, 128), (2, 100, 64)]
    for t in range(3):
        alone = chapter.index_scores(q[:, :, t : t + 1], w[:, t : t + 1], k)
        assert torch.allclose(got[:, t : t + 1], alone, rtol=0, atol=1e-4)


def test_scores_of_bf16_are_added_in_fp32():
    """Rounded to 8 bits, 1,000 tokens would share a hundred scores, and ties would choose."""
    torch.manual_seed(0)
    q, w, k = torch.randn(1, 8, 1, 16), torch.randn(1, 1, 8), torch.randn(1, 1000, 16)
    q, w, k = (t.bfloat16() for t in (q, w, k))
    got = chapter.index_scores(q, w, k)
    assert got.dtype == torch.float32 and len(got.unique()) > 900
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(chapter.index_scores(q, w, k), got)


@pytest.mark.parametrize("heads", [16, 1])  # with one, half of all scores are 0
@pytest.mark.parametrize("gather", [False, True])
def test_layer_is_equations_1_and_2(gather, heads):
    layer = layer_of(index_n_heads=heads)
    x = torch.randn(2, 30, 32, dtype=torch.float64)
    want = torch.stack([chapter.layer_reference(layer, row) for row in x])
    with torch.no_grad():
        assert torch.allclose(layer(x, gather=gather), want, rtol=0, atol=1e-12)


def test_gathering_some_queries_at_a_time_is_the_same(monkeypatch):
    layer, x = layer_of(), torch.randn(3, 30, 32, dtype=torch.float64)
    with torch.no_grad():
        want, sizes = layer(x, gather=False), []
        real = layer.absorbed
        monkeypatch.setattr(layer, "absorbed", lambda q, *a: sizes.append(len(q)) or real(q, *a))
        monkeypatch.setattr(chapter, "AT_A_TIME", 3 * 4 * (6 * (16 + 4) + 30))  # four queries
        assert torch.allclose(layer(x, gather=True), want, rtol=0, atol=1e-12)
    assert sizes == [12] * 7 + [6]


def test_what_is_not_chosen_is_not_read():
    """A token without a place among the six can be anything, and as a key it scores lowest."""
    layer, x = layer_of(), torch.randn(1, 30, 32, dtype=torch.float64)
    with torch.no_grad():
        cos, sin = layer.cos_sin(torch.arange(30), x.dtype)
        scores = scores_of(layer, x, layer.query_latent(x), cos, sin)[0, -1]
        worst = scores.argmin()
        cache = mla.LatentCache(1, 30, 16, 12, dtype=x.dtype)
        layer(x[:, :29], cache)
        want = layer(x[:, 29:], cache)
        cache.truncate(29)
        assert worst < 29
        cache.entries[0, worst, :20] = 1e6
        assert torch.equal(layer(x[:, 29:], cache), want)
        cache.truncate(29)
        cache.entries[0, scores.argmax(), :20] = 1e6
        assert not torch.allclose(layer(x[:, 29:], cache), want)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("gather, topk", [(None, 6), (True, 6), (False, 6), (None, 64)])
@pytest.mark.parametrize("tail", [1, 2, 20])
def test_rows_of_unequal_length_and_drafts_that_are_taken_back(paged, gather, topk, tail):
    """20 new tokens are above `absorb_below`: with K enough for all they are spelled out."""
    layer, x = layer_of(topk), torch.randn(2, 60, 32, dtype=torch.float64)
    with torch.no_grad():
        full = layer(x)
        kind = mla.PagedLatentCache if paged else mla.LatentCache
        cache = kind(2, 128, 16, 12, dtype=x.dtype)
        layer(x[:, :25], cache)
        cache.truncate([25, 11])
        tails = torch.stack((x[0, 25 : 25 + tail], x[1, 11 : 11 + tail]))
        layer(tails + 1, cache, gather)  # a draft
        cache.truncate([25, 11])
        got = layer(tails, cache, gather)
        want = torch.stack((full[0, 25 : 25 + tail], full[1, 11 : 11 + tail]))
        assert torch.allclose(got, want, rtol=0, atol=1e-12)


def test_no_rows_and_no_tokens():
    layer = layer_of(dtype=torch.float32)
    for shape in (0, 20, 32), (2, 0, 32):
        with torch.no_grad():
            assert layer(torch.randn(shape)).shape == shape
        layer.train()(torch.randn(shape))
        assert layer.index_loss == 0
        layer.eval()
    cache = mla.LatentCache(0, 40, 16, 12)
    with torch.no_grad():
        layer(torch.randn(0, 30, 32), cache)
        assert layer(torch.randn(0, 1, 32), cache).shape == (0, 1, 32)


def test_without_a_query_latent_the_indexer_reads_x():
    layer, x = layer_of(q_lora_rank=None), torch.randn(1, 30, 32, dtype=torch.float64)
    assert layer.indexer.wq_b.in_features == 32
    want = chapter.layer_reference(layer, x[0])
    assert torch.allclose(layer(x)[0], want, rtol=0, atol=1e-12)
    cache = mla.LatentCache(1, 30, 16, 12, dtype=x.dtype)
    with torch.no_grad():
        parts = [layer(part, cache) for part in x.split(1, 1)]
    assert torch.allclose(torch.cat(parts, 1)[0], want, rtol=0, atol=1e-12)


def test_enough_for_all_is_02s_layer():
    layer, x = layer_of(index_topk=30), torch.randn(2, 30, 32, dtype=torch.float64)
    dense = mla.MultiHeadLatentAttention(**chapter.SIZES).to(x)
    dense.load_state_dict(layer.state_dict(), strict=False)
    assert torch.allclose(layer(x), dense(x), rtol=0, atol=1e-12)
    layer.index_topk = 29
    assert not torch.allclose(layer(x), dense(x), rtol=0, atol=1e-6)
    layer.dense = True
    assert torch.allclose(layer(x), dense(x), rtol=0, atol=1e-12)


def test_short_caches_are_decoded_absorbed(monkeypatch):
    """While K is enough for all, a token takes 02's way: nothing is spelled out, masked, scored."""
    layer, x = layer_of(index_topk=64), torch.randn(2, 30, 32, dtype=torch.float64)
    with torch.no_grad():
        want, cache = layer(x), mla.LatentCache(2, 30, 16, 12, dtype=x.dtype)
        layer(x[:, :20], cache)
        monkeypatch.setattr(layer, "explicit", None)
        monkeypatch.setattr(layer.indexer, "queries", None)
        got, seen = [layer(x[:, 20:22], cache)], []
        real = layer.absorbed
        monkeypatch.setattr(layer, "absorbed", lambda *a: seen.append(a[3]) or real(*a))
        got += [layer(part, cache) for part in x[:, 22:].split(1, 1)]
    assert torch.allclose(torch.cat(got, 1), want[:, 20:], rtol=0, atol=1e-12)
    assert seen == [None] * 8


def test_a_pool_is_read_where_it_lies(monkeypatch):
    """Of a paged cache the index keys alone are spelled out, not the entries."""
    layer, x = layer_of(), torch.randn(2, 130, 32, dtype=torch.float64)
    real, widths = mla.unpaged, []
    spy = lambda part, *rest: widths.append(part.shape[-1]) or real(part, *rest)
    with torch.no_grad():
        want, cache = layer(x), mla.PagedLatentCache(2, 192, 16, 12, dtype=x.dtype)
        layer(x[:, :129], cache)
        monkeypatch.setattr(chapter.mla, "unpaged", spy)
        got = layer(x[:, 129:], cache)
    assert torch.allclose(got, want[:, 129:], rtol=0, atol=1e-12) and widths == [8]


def test_a_long_prompt_takes_no_square_of_memory():
    """4,096 queries of 4,096 slots: no tensor of T · S numbers, be it scores or mask."""
    layer = layer_of(16, torch.float32, index_n_heads=1).eval()
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor):
                largest.append(made.untyped_storage().nbytes() // made.element_size())
            return made

    with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(chapter, "AT_A_TIME", 2**20)
        with Watch():
            layer(torch.randn(1, 4096, 32), gather=True)
    assert max(largest) < 4096 * 4096 / 4


def test_the_cheaper_form_is_taken():
    """V3.2's sizes: at 4k, spelling out pays for long prompts; at 128k, gathering always does."""
    with torch.device("meta"):
        heads = {"num_attention_heads": 128, "kv_lora_rank": 512, "qk_nope_head_dim": 128}
        heads |= {"qk_rope_head_dim": 64, "v_head_dim": 128}
        layer = layer_of(2048, index_head_dim=64, **heads)
    assert layer.gathering_pays(1, 4096) and layer.gathering_pays(131072, 131072)
    assert not layer.gathering_pays(4096, 4096)
    # a query: 2048 · 1088 gathered, 4096 · 320 read and its share of 4096 · 131072 spelled out
    assert layer.gathering_pays(585, 4096) and not layer.gathering_pays(586, 4096)


def test_impossible_indexers_are_named():
    with pytest.raises(ValueError, match="index_head_dim 4 < qk_rope_head_dim 8"):
        chapter.LightningIndexer(32, 24, 4, 4, 8)
    with pytest.raises(ValueError, match="index_head_dim 4 < qk_rope_head_dim 8"):
        replace(TINY, index_head_dim=4)
    with pytest.raises(ValueError, match="index_topk must be an int >= 1, got 0"):
        replace(TINY, index_topk=0)
    with pytest.raises(ValueError, match="want index_topk of 1 or more, got 0"):
        layer_of(index_topk=0)


# --- learning --------------------------------------------------------------------------------


@pytest.mark.parametrize("dense", [True, False])
def test_index_loss_by_loops_and_its_gradient(dense):
    """Equations 3 and 4 from the layer's parts, one query at a time."""
    layer, x = layer_of().train(), torch.randn(2, 12, 32, dtype=torch.float64)
    layer.dense = dense
    layer(x)
    got = torch.autograd.grad(layer.index_loss, list(layer.indexer.parameters()))
    (N, _), (L, _) = layer.q_split, layer.latent_split
    cos, sin = layer.cos_sin(torch.arange(12), x.dtype)
    c = layer.query_latent(x).detach()
    (q_nope, q_rope), (latent, k_rope) = layer.queries(c, cos, sin), layer.latents(x, cos, sin)
    scores = scores_of(layer, x, c, cos, sin)
    k_nope = torch.einsum("hnl,bsl->bhsn", layer.kv_b_proj.weight.view(4, -1, L)[:, :N], latent)
    total = 0.0
    for b in range(2):
        for t in range(12):
            order = scores[b, t, : t + 1].argsort(descending=True)
            best = order if dense else order[:6]
            p = 0.0
            for h in range(4):
                logits = k_nope[b, h, best] @ q_nope[b, h, t] + k_rope[b, best] @ q_rope[b, h, t]
                p = p + (layer.scale * logits).softmax(0).detach()
            p = p / p.sum()
            total = total + F.kl_div(scores[b, t, best].log_softmax(0), p, reduction="sum")
    want = total / 24
    assert torch.allclose(layer.index_loss, want, rtol=0, atol=1e-12)
    for ours, theirs in zip(
        got, torch.autograd.grad(want, list(layer.indexer.parameters())), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-12) and ours.any()


def test_no_gradient_of_the_index_loss_leaves_the_indexer():
    """To the layers before either: both of its inputs are detached."""
    layer = layer_of(dtype=torch.float32).train()
    x = torch.randn(2, 12, 32, requires_grad=True)
    layer(x)
    layer.index_loss.backward()
    reached = {name for name, p in layer.named_parameters() if p.grad is not None and p.grad.any()}
    assert x.grad is None and reached == {
        "indexer.wq_b.weight", "indexer.wk.weight", "indexer.k_norm.weight",
        "indexer.k_norm.bias", "indexer.weights_proj.weight",
    }  # fmt: skip


def test_scores_are_as_large_as_the_released_ones():
    """Their size chooses nothing, but it is the softmax's in eq. 3 and 4: 1/√(J·E)."""
    layer, x = layer_of(), torch.randn(2, 12, 32, dtype=torch.float64)
    cos, sin = layer.cos_sin(torch.arange(12), x.dtype)
    _, w = layer.indexer.queries(x, layer.query_latent(x), cos, sin)
    want = layer.indexer.weights_proj(x) / math.sqrt(16 * 8)
    assert torch.allclose(w, want, rtol=0, atol=1e-12)


def test_while_learning_nothing_is_gathered(monkeypatch):
    layer, x = layer_of().eval(), torch.randn(1, 30, 32, dtype=torch.float64)
    monkeypatch.setattr(layer, "gathering_pays", lambda T, S: True)
    with torch.no_grad():
        want = layer(x)
    monkeypatch.setattr(layer, "read_gathered", None)
    assert torch.allclose(layer(x), want, rtol=0, atol=1e-12)
    with torch.no_grad(), pytest.raises(TypeError):
        layer(x)


def test_index_loss_is_left_by_training_alone():
    layer, x = layer_of(dtype=torch.float32), torch.randn(1, 12, 32)
    for mode, gradients, cache, left in (
        (True, True, None, True), (False, True, None, False), (True, False, None, False),
        (True, True, mla.LatentCache(1, 12, 16, 12), False),
    ):  # fmt: skip
        layer.train(mode)
        with torch.set_grad_enabled(gradients):
            layer(x, cache)
        assert (layer.index_loss is not None) == left, (mode, gradients)


def test_gradients_of_the_choice_are_those_of_the_mask():
    """The output's gradient through the chosen entries, by finite differences."""
    layer = layer_of()
    x = torch.randn(1, 9, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), eps=1e-6, atol=1e-6)


def test_the_two_stages_move_what_they_should():
    model = model_of().train()
    rows = tokens_of(2, 33)

    def step():
        before = {name: p.clone() for name, p in model.named_parameters()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
        loss = model.loss(rows[:, :-1], rows[:, 1:]) + model.take_index_loss()
        loss.backward()
        optimizer.step()
        model.zero_grad()
        return {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}

    model.warm_up()
    dense = base.DeepSeek(base_config()).eval()
    dense.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        assert torch.allclose(model.eval()(rows), dense(rows), atol=1e-5)
    model.train()
    everything = {name for name, _ in model.named_parameters()}
    assert step() == {name for name in everything if ".indexer." in name}
    model.warm_up(False)
    assert not any(attention.dense for attention in model.attentions())
    assert step() == everything


def test_an_index_loss_is_taken_once():
    """Else a layer that the next pass leaves out, as MTP's, would give its old graph again."""
    model = model_of(replace(TINY, num_nextn_predict_layers=1)).train()
    rows = tokens_of(2, 33)
    loss, further = model.losses(rows, 0.3)
    parts = [a.index_loss.item() for a in model.attentions()]
    taken = model.take_index_loss()
    assert len(parts) == 4 and math.isclose(taken.item(), sum(parts), rel_tol=1e-6)
    (loss + further + taken).backward()
    copy.deepcopy(model.mtp)
    (model.loss(rows[:, :-1], rows[:, 1:]) + model.take_index_loss()).backward()
    with pytest.raises(ValueError, match="no index loss"):
        model.take_index_loss()


def test_warm_up_teaches_the_indexer():
    """200 steps on one batch bring eq. 3 to a third; a reversed sign would drive it up."""
    layer, x = layer_of(dtype=torch.float32).train(), torch.randn(4, 24, 32)
    layer.dense = True
    with torch.no_grad():
        layer.scale = 2.0  # attention with something to say
    optimizer = torch.optim.AdamW(layer.indexer.parameters(), 1e-2)
    losses = []
    for _ in range(200):
        layer(x)
        layer.index_loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(layer.index_loss.item())
    assert losses[-1] < losses[0] / 3, (losses[0], losses[-1])


# --- the model -------------------------------------------------------------------------------


def base_config(config=TINY):
    sizes = {k: v for k, v in asdict(config).items() if not k.startswith("index_")}
    return base.DeepSeekConfig(**sizes)


def theirs_of(folder, **how):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **how).eval()


@pytest.mark.parametrize("scaling", [None, YARN], ids=["rope", "yarn"])
def test_logits_and_gradients_are_transformers(scaling, tmp_path):
    model = model_of(replace(TINY, rope_scaling=scaling))
    model.save_pretrained(tmp_path)
    theirs = theirs_of(tmp_path, attn_implementation="eager")
    assert type(theirs).__name__ == "DeepseekV32ForCausalLM"
    tokens = tokens_of(2, 60)
    got, want = model(tokens), theirs(tokens).logits
    assert (got - want).abs().max() <= 1e-4
    upstream = torch.randn_like(got)
    (got * upstream).sum().backward()
    (want * upstream).sum().backward()
    other = dict(theirs.named_parameters())
    compared = 0
    for name, parameter in model.named_parameters():
        if ".indexer." in name:
            assert parameter.grad is None
        elif ".experts." not in name:  # stacked in another way; 03 compares them
            error = (parameter.grad - other[name].grad).abs().max()
            assert error <= 1e-4 * (1 + other[name].grad.abs().max()), name
            compared += 1
    assert compared > 30


def test_their_checkpoint_is_ours(tmp_path):
    config = transformers.DeepseekV32Config(**{
        k: v for k, v in asdict(TINY).items() if k not in ("rope_interleave", "rope_theta")
    } | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.DeepseekV32ForCausalLM(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    theirs.save_pretrained(tmp_path)
    tokens = tokens_of(2, 60)
    for ours in (
        chapter.SparseDeepSeek.from_pretrained(tmp_path),
        released.load_released(tmp_path, model_class=chapter.SparseDeepSeek),
    ):
        with torch.no_grad():
            assert (ours(tokens) - theirs(tokens).logits).abs().max() <= 1e-4


def test_cached_decoding_is_transformers(tmp_path):
    model = model_of()
    model.save_pretrained(tmp_path)
    theirs, prompt = theirs_of(tmp_path), tokens_of(1, 20)
    want = theirs.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, 20:]
    assert model.generate(prompt.tolist(), 12) == [want.tolist()]


def test_drafts_and_unequal_prompts_write_the_same():
    model = model_of(replace(TINY, num_nextn_predict_layers=1))
    prompts = [tokens_of(n, seed=n).tolist() for n in (3, 20, 11)]
    plain = [model.generate([prompt], 12)[0] for prompt in prompts]
    assert model.generate(prompts, 12) == plain
    assert model.generate(prompts, 12, speculative=True) == plain


def test_released_files_in_fp8_and_back(tmp_path):
    """wq_b and wk in blocks; weights_proj and k_norm stay as wide as they are."""
    model = model_of(replace(TINY, num_nextn_predict_layers=1, moe_intermediate_size=128))
    released.save_released(model, tmp_path / "out", in_fp8=True)
    shards = released.Shards(tmp_path / "out")
    for layer in range(4):
        kinds = {
            name.rsplit("indexer.")[1]: kind
            for name, kind in shards.kind.items()
            if name.startswith(f"model.layers.{layer}.self_attn.indexer.")
        }
        assert kinds == {
            "wq_b.weight": "F8_E4M3", "wq_b.weight_scale_inv": "F32", "wk.weight": "F8_E4M3",
            "wk.weight_scale_inv": "F32", "k_norm.weight": "F32", "k_norm.bias": "F32",
            "weights_proj.weight": "F32",
        }  # fmt: skip
    load = lambda **how: released.load_released(
        tmp_path / "out", model_class=chapter.SparseDeepSeek, **how
    )
    wide, kept = load(dtype=torch.float32), load(keep_fp8=True).float()
    assert type(wide) is chapter.SparseDeepSeek and wide.config == model.config
    c = torch.randn(5, 24)
    for ours, theirs in ((m.attentions()[1].indexer.wq_b, model.attentions()[1].indexer.wq_b)
                         for m in (wide, kept)):  # fmt: skip
        error = (ours(c) - theirs(c)).norm() / theirs(c).norm()
        assert error < 0.05, error  # E4M3 keeps 4 bits of a number
    assert isinstance(kept.attentions()[1].indexer.wk, released.StoredLinear)
    with torch.no_grad():  # 5 tokens, fewer than are read: no choice that could flip
        got, want = (
            m.model.layers[0](torch.randn(1, 5, 64, generator=seeded())) for m in (kept, wide)
        )
    assert (got - want).norm() / want.norm() < 0.05
    with pytest.raises(ValueError, match="model_type 'deepseek_v32'"):
        released.load_released(tmp_path / "out")


V32_JSON = {
    "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32",
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": 1,
    "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168,
    "index_head_dim": 128, "index_n_heads": 64, "index_topk": 2048, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn",
    },
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": True,
    "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip


def test_the_released_config_builds_v32():
    config = chapter.SparseConfig.from_dict(V32_JSON)
    assert (config.index_n_heads, config.index_head_dim, config.index_topk) == (64, 128, 2048)
    assert chapter.SparseConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with torch.device("meta"):
        model = chapter.SparseDeepSeek(config)
    count = lambda m: sum(t.numel() for t in m.state_dict().values())
    indexer = 1536 * 8192 + 7168 * 128 + 2 * 128 + 7168 * 64
    assert count(model) - count(model.mtp) == 671_026_419_200 + 61 * indexer
    assert model_of().new_caches(1, 1)[0].entries.numel() == 32 + 8 + 20  # V3.2: 512 + 64 + 128


def test_a_config_may_have_any_widths():
    raw = V32_JSON | {"qk_rope_head_dim": 160, "index_head_dim": 192, "index_topk": 5}
    config = chapter.SparseConfig.from_dict(raw)
    assert (config.qk_rope_head_dim, config.index_head_dim, config.index_topk) == (160, 192, 5)


def test_configs_of_other_models_are_refused():
    with pytest.raises(ValueError, match="model_type 'deepseek_v3': want 'deepseek_v32'"):
        chapter.SparseConfig.from_dict(V32_JSON | {"model_type": "deepseek_v3"})
    with pytest.raises(ValueError, match="attention_bias"):
        chapter.SparseConfig.from_dict(V32_JSON | {"attention_bias": True})
    with pytest.raises(ValueError, match="deepseek_v32"):
        base.DeepSeekConfig.from_dict(V32_JSON)


def test_a_dense_model_becomes_sparse():
    torch.manual_seed(0)
    dense, tokens = base.DeepSeek(base_config()).eval(), tokens_of(2, 30)
    sparse = chapter.SparseDeepSeek.from_dense(dense, 8, 16, index_topk=30).eval()
    with torch.no_grad():
        assert torch.allclose(sparse(tokens), dense(tokens), atol=1e-5)
        few = chapter.SparseDeepSeek.from_dense(dense, 8, 16, index_topk=4).eval()
        assert not torch.allclose(few(tokens), dense(tokens), atol=1e-3)
        assert torch.allclose(few(tokens)[:, :4], dense(tokens)[:, :4], atol=1e-5)


def test_what_cannot_become_sparse_is_said(tmp_path):
    model = model_of(replace(TINY, moe_intermediate_size=128))
    with pytest.raises(ValueError, match="has indexers already"):
        chapter.SparseDeepSeek.from_dense(model, 8, 16, 4)
    released.save_released(base.DeepSeek(base_config(model.config)), tmp_path / "out", in_fp8=True)
    kept = released.load_released(tmp_path / "out", keep_fp8=True)
    with pytest.raises(ValueError, match="keeps FP8 codes"):
        chapter.SparseDeepSeek.from_dense(kept, 8, 16, 4)
    half = chapter.SparseDeepSeek.from_dense(base.DeepSeek(base_config()).bfloat16(), 8, 16, 4)
    assert half.attentions()[0].indexer.wk.weight.dtype == torch.bfloat16


def test_bf16_reads_the_same_tokens_in_both_forms():
    layer = layer_of(dtype=torch.bfloat16)
    x = torch.randn(2, 301, 32).bfloat16()  # a length that bf16 has no number for
    with torch.no_grad():
        masked, gathered = layer(x, gather=False), layer(x, gather=True)
        cached = layer(x, mla.LatentCache(2, 301, 16, 12, dtype=x.dtype), gather=False)
    assert torch.equal(masked, cached)
    error = (masked - gathered).float().norm() / masked.float().norm()
    assert gathered.dtype == torch.bfloat16 and error < 0.02, error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_caches_are_as_wide_as_the_weights(dtype):
    caches = model_of().to(dtype).new_caches(2, 9, layers=2)
    assert [(c.entries.dtype, c.entries.shape[1:]) for c in caches] == [(dtype, (9, 60))] * 2


# --- what the chapter claims -----------------------------------------------------------------


def test_a_batch_asks_what_it_told():
    reader = chapter.Reader(16)
    keys, values, want = reader.batch(5)
    assert keys.shape == values.shape == (5, 320) and want.shape == (5, 64)
    for row in range(5):
        told = dict(zip(keys[row, :256].tolist(), values[row, :256].tolist(), strict=True))
        assert len(told) == 256 and set(values[row, 256:].tolist()) == {16}
        assert [told[k] for k in keys[row, 256:].tolist()] == want[row].tolist()


@pytest.mark.slow
def test_the_lesson(tmp_path):
    command = [sys.executable, "10_sparse_attention.py", "--out", str(tmp_path), "--seed", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    checks, measures = import_module("benchmarks.record").receipt(done.stdout.splitlines())
    assert len(checks) == 13 and all(check["ok"] for check in checks)
    right = {m["name"].removeprefix("right_"): m["value"] for m in measures}
    assert right["sparse_training"] > 0.9 > 0.3 > right["untrained_indexer"]
    assert (tmp_path / "10_sparse_attention.png").read_bytes().startswith(b"\x89PNG")


def test_the_checks_of_the_lesson(capsys):
    chapter.verify_layer(torch.device("cpu"))
    chapter.verify_learning(torch.device("cpu"))
    assert capsys.readouterr().out.count("ok\n") == 12


@pytest.mark.parametrize("behind", range(1, 9))
def test_queries_that_see_fewer_than_they_may_read(behind):
    """Three behind so many others: the first of them may see less than the 6 that each reads."""
    layer, x = layer_of(6), torch.randn(2, behind + 3, 32).double()
    with torch.no_grad():
        parts = []
        for gather in False, True:
            cache = mla.LatentCache(2, 30, 16, 12, dtype=x.dtype)
            layer(x[:, :behind], cache)
            parts.append(layer(x[:, behind:], cache, gather=gather))
    assert torch.allclose(*parts, rtol=0, atol=1e-12)


def test_a_layer_that_is_learning_can_be_copied():
    layer = layer_of(6)
    layer.train()(torch.randn(2, 9, 32).double())
    assert layer.index_loss is not None
    other = copy.deepcopy(layer)
    assert other.index_loss is None and layer.index_loss is not None


def test_numbers_of_the_docstring():
    dense = 131072 * 128 * (2 * 512 + 64)
    sparse = 131072 * 64 * 128 + 2048 * 128 * (2 * 512 + 64)
    assert math.isclose(dense, 18.3e9, rel_tol=0.005) and math.isclose(sparse, 1.4e9, rel_tol=0.04)
    assert 2 * 512 + 64 == 1088


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_recorded_decoding_is_sparse_too(device):
    """08's, whose caches show all of their slots: the stale ones are never among the chosen."""
    model = model_of(replace(TINY, max_position_embeddings=400)).to(device)
    recorded = copy.deepcopy(model)
    released.record_decoding(recorded)
    for lengths in (1, 9, 40), (30,), (250,):
        prompts = [tokens_of(n, seed=n).tolist() for n in lengths]
        want, got = (m.generate(prompts, 30) for m in (model, recorded))
        gaps = [base.mtp.logit_gap(model, *texts) for texts in zip(prompts, want, got, strict=True)]
        assert max(gaps) <= (0 if device == "cpu" else 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("topk", [6, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("paged", [False, True])
def test_decoding_on_a_gpu(dtype, topk, paged):
    """A token at a time, by 02's kernels, beside the mask over all."""
    layer, x = layer_of(topk, dtype).cuda(), torch.randn(2, 60, 32).to("cuda", dtype)
    with torch.no_grad():
        kind = mla.PagedLatentCache if paged else mla.LatentCache
        cache = kind(2, 64, 16, 12, x.device, dtype)
        got = torch.cat([layer(token, cache, gather=True) for token in x.split(1, 1)], 1)
        want = layer(x, gather=False)
    error = (got - want).float().norm() / want.float().norm()
    assert error <= (1e-4 if dtype == torch.float32 else 0.05), error


def test_scores_of_one_query_may_be_more_than_fit_at_a_time(monkeypatch):
    q, w, k = torch.randn(2, 4, 3, 8), torch.randn(2, 3, 4), torch.randn(2, 9, 8)
    want = chapter.index_scores(q, w, k)
    monkeypatch.setattr(chapter, "AT_A_TIME", 10)
    assert torch.allclose(chapter.index_scores(q, w, k), want, rtol=0, atol=1e-5)


def test_attention_to_be_matched_is_a_constant_and_a_mean_in_fp32():
    p = torch.rand(1, 3, 5).softmax(-1).requires_grad_()
    scores, all_ = torch.randn(1, 3, 5, requires_grad=True), torch.ones(1, 3, 5, dtype=torch.bool)
    chapter.index_divergence(p, scores, all_).backward()
    assert p.grad is None and scores.grad.any()
    layer = layer_of(dtype=torch.bfloat16)
    x = torch.randn(1, 30, 32).bfloat16()
    cos, sin = layer.cos_sin(torch.arange(30), x.dtype)
    q, entries = layer.queries(layer.query_latent(x), cos, sin), layer.latents(x, cos, sin)
    seen = torch.ones(1, 30, 30, dtype=torch.bool).tril()
    got = layer.attended(*q, torch.cat(entries, -1), seen)
    assert got.dtype == torch.float32 and (got.sum(-1) - 1).abs().max() <= 1e-5


def test_a_dense_model_in_fp8_becomes_a_sparse_one_in_fp8():
    sparse = chapter.SparseDeepSeek.from_dense(base.DeepSeek(base_config(), "fp8"), 4, 8, 6)
    assert sparse.precision == "fp8"
    for attention in sparse.attentions():
        indexer = attention.indexer
        kinds = [type(part) for part in (indexer.wq_b, indexer.wk, indexer.weights_proj)]
        assert kinds == [base.fp8.FP8Linear, base.fp8.FP8Linear, torch.nn.Linear]


def test_the_seed_is_set_and_bench_goes_on_to_128k(tmp_path, monkeypatch):
    """`main` alone: what it calls notes the seed and does nothing."""
    seeds, contexts = [], []
    for name in "verify_layer", "verify_learning", "train_reader", "compare_choices", "draw":
        monkeypatch.setattr(chapter, name, lambda *args: seeds.append(torch.initial_seed()))
    monkeypatch.setattr(chapter, "decode", lambda device, sizes, rounds: contexts.append(sizes))
    args = ["10_sparse_attention.py", "--device", "cpu", "--seed", "5", "--out", str(tmp_path)]
    for flags in [], ["--bench"]:
        monkeypatch.setattr(sys, "argv", args + flags)
        chapter.main()
    assert set(seeds) == {5} and [sizes[-1] for sizes in contexts] == [2**15, 2**17]
