"""05_mtp.py against loops, transformers' MTP layer, plain decoding and exact probabilities."""

import copy
import itertools
import math
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

mtp = import_module("05_mtp")
chapter = import_module("06_train")
bench = import_module("benchmarks.mtp")
MTPModule, TinyBlock, TinyModel = mtp.MTPModule, mtp.TinyBlock, mtp.TinyModel
EXACT = 1e-12

# with YaRN, groups and q-LoRA
TINY = replace(
    import_module("test_train").TINY,
    vocab_size=41,
    num_nextn_predict_layers=1,
    max_position_embeddings=128,
    initializer_range=0.2,
)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def tiny(V=13, width=16, depth=1, layers=2):
    """Norms that are not 1, no two logits that tie, and texts that don't soon go in a circle."""
    model = TinyModel(V, width, layers, depth).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1, 0.2)
        model.head.weight.normal_(0, 0.5)
        model.embed.weight.normal_()
        for block in model.blocks:
            block.qkv.weight.mul_(3)
    return model


def deepseek(config=TINY):
    model = chapter.DeepSeek(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.normal_(1, 0.2)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.uniform_(-1, -0.1)
    return model.eval()


def prompts_of(V, lengths):
    return [torch.randint(V, (length,)).tolist() for length in lengths]


def loss_of(model, tokens, weight=1.0, **more):
    hidden = model.hidden(tokens[:, :-1])
    return mtp.mtp_loss(model.mtp, model.embed, model.head, hidden, tokens, weight, **more)


# The loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("extra", [0, 1, 7])
def test_loss_is_the_equations(depth, extra):
    model, tokens = tiny(depth=depth), torch.randint(13, (3, depth + 2 + extra))
    states = model.hidden(tokens[:, :-1])
    rows = zip(states, tokens.tolist(), strict=True)
    want = [mtp.mtp_reference(model.mtp, model.embed, model.head, h, t) for h, t in rows]
    got = loss_of(model, tokens, weight=0.3)
    assert abs(got - 0.3 * torch.stack(want).mean()) <= EXACT


@pytest.mark.parametrize("depth", [1, 2])
def test_pairs_across_a_border_predict_nothing(depth):
    """By hand: position i of module k counts unless t[i] and t[i + k] are of two documents."""
    model, tokens = tiny(depth=depth), torch.randint(13, (2, 9))
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2, 2], [0] * 8 + [1]])
    hidden, want = model.hidden(tokens[:, :-1]), 0.0
    for k, module in enumerate(model.mtp, start=1):
        hidden = module(model.embed(tokens[:, k:8]), hidden[:, : 8 - k])
        for b, i in itertools.product(range(2), range(8 - k)):
            if documents[b, i] == documents[b, i + k]:
                log_probs = model.head(hidden[b, i]).log_softmax(-1)
                want = want - log_probs[tokens[b, i + k + 1]] / (2 * 8) / depth
    assert abs(loss_of(model, tokens, documents=documents) - want) <= EXACT
    same = loss_of(model, tokens, documents=torch.zeros_like(documents))
    assert torch.equal(same, loss_of(model, tokens))


def test_loss_refuses_documents_of_another_shape():
    with pytest.raises(ValueError, match=r"documents \(2, 8\), tokens \(2, 9\)"):
        loss_of(tiny(), torch.randint(13, (2, 9)), documents=torch.zeros(2, 8, dtype=torch.int64))


def test_loss_of_bf16_logits_is_summed_in_fp32():
    model, tokens = tiny().float(), torch.randint(13, (2, 9))
    hidden = model.hidden(tokens[:, :-1])
    head = lambda h: model.head(h).bfloat16()
    got = mtp.mtp_loss(model.mtp, model.embed, head, hidden, tokens)
    assert got.dtype == torch.float32


def test_loss_through_a_fused_head():
    model, tokens = tiny(), torch.randint(13, (2, 9))
    seen = []

    def nats(h, y):
        seen.append((h.shape, y.shape))
        return F.cross_entropy(model.head(h), y, reduction="sum")

    assert abs(loss_of(model, tokens, nats=nats) - loss_of(model, tokens)) <= EXACT
    assert seen == [((14, 16), (14,))]


def test_gradients_are_right():
    """Of all that the loss touches, against finite differences."""
    model, tokens = tiny(V=5, width=8, depth=2, layers=1), torch.randint(5, (1, 6))
    names, parameters = zip(*model.named_parameters(), strict=True)

    def loss(*values):
        with torch.nn.utils.parametrize.cached():
            swapped = dict(zip(names, values, strict=True))
            return torch.func.functional_call(
                Whole(model), {f"model.{n}": v for n, v in swapped.items()}, tokens
            )

    torch.autograd.gradcheck(loss, parameters, fast_mode=True)


class Whole(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return loss_of(self.model, tokens)


def test_gradients_reach_the_trunk_and_the_embedding_once_from_each_use():
    model, tokens = tiny(), torch.randint(13, (2, 9))
    loss_of(model, tokens).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.blocks.parameters())
    shared = model.embed.weight.grad.clone()
    model.zero_grad()
    trunk, joined = model.embed, copy.deepcopy(model.embed)
    hidden = model.hidden(tokens[:, :-1])
    mtp.mtp_loss(model.mtp, joined, model.head, hidden, tokens, 1.0).backward()
    assert trunk.weight.grad.abs().sum() > 0 and joined.weight.grad.abs().sum() > 0
    assert (trunk.weight.grad + joined.weight.grad - shared).abs().max() <= EXACT


@pytest.mark.parametrize("changed", range(2, 10))
def test_a_guess_sees_no_token_it_guesses(changed):
    """Position i guesses t[i + 2]: t[i + 2] and later change nothing, t[i + 1] changes it."""
    model, tokens = tiny(), torch.randint(13, (1, 11))

    def guesses(t):
        return mtp_states(model, t)[0]

    other = tokens.clone()
    other[0, changed:] = (other[0, changed:] + 1) % 13
    before, after = guesses(tokens), guesses(other)
    assert torch.equal(before[: changed - 1], after[: changed - 1])
    assert (before[changed - 1] - after[changed - 1]).abs().max() > 1e-3


def mtp_states(model, tokens):
    return model.mtp[0](model.embed(tokens[:, 1:]), model.hidden(tokens)[:, :-1])


@pytest.mark.parametrize("depth", [1, 2])
def test_random_tokens_stay_unguessed(depth):
    """A peer's module reaches 0.0006 on dice, reading its own label."""
    model = TinyModel(4, 16, layers=1, depth=depth)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    late = []
    for step in range(150):
        loss = loss_of(model, torch.randint(4, (64, 13)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        late += [loss.item()] if step >= 100 else []
    counted = sum(12 - k for k in range(1, depth + 1)) / 12 / depth
    assert abs(sum(late) / len(late) / counted - math.log(4)) <= 0.02


def test_what_blocks_add_up_stays_fp32_under_autocast():
    """And no warning: a norm whose weight is fp32 and whose input isn't takes ten times as long."""
    seen = []

    class Block(nn.Module):
        def forward(self, x):
            seen.append(x.dtype)
            return x

    module = MTPModule(Block(), 16)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(torch.randn(1, 3, 16), torch.randn(1, 3, 16))
    assert seen == [torch.float32] and out.dtype == torch.float32


@pytest.mark.parametrize(
    "depth, tokens, message",
    [(0, (2, 9), "depth 0"), (1, (2, 8), "hidden of 2 x 8"), (1, (3, 9), "hidden of 2 x 8")],
)
def test_loss_refuses(depth, tokens, message):
    model = tiny(depth=depth)
    with pytest.raises(ValueError, match=message):
        hidden = model.hidden(torch.zeros(2, 8, dtype=torch.int64))
        mtp.mtp_loss(model.mtp, model.embed, model.head, hidden, torch.zeros(tokens, dtype=int))


def test_loss_refuses_a_sequence_too_short_for_its_depth():
    with pytest.raises(ValueError, match="depth 2 predicts nothing in 3 tokens: it needs 4"):
        loss_of(tiny(depth=2), torch.zeros(1, 3, dtype=torch.int64))


# The module, in the released form ------------------------------------------------------------


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A released folder of ours, and transformers' main model and MTP model of it."""
    from transformers import DeepseekV3ForCausalLM
    from transformers.modeling_layers import MtpModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # transformers knows the MTP layer of 61 layers alone
    layers = [r"model\.layers\.3\..*"]
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", layers)
    ours = deepseek()
    ours.save_pretrained(tmp_path)
    model = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    return ours, model.eval(), MtpModel.from_pretrained(model).eval()


def test_module_is_transformers_mtp_layer(theirs):
    """Same weights, outputs and every gradient; positions are not shifted."""
    ours, model, module = theirs
    tokens = torch.randint(41, (2, 24))
    hidden = ours.hidden(tokens).detach()
    mine, yours = (hidden[:, :-1].clone().requires_grad_() for _ in "ab")
    got = ours.mtp[0](ours.embed(tokens[:, 1:]), mine)
    positions = torch.arange(23)[None]
    want = module.forward_layer(0, yours, positions, None, input_ids=tokens[:, 1:])
    assert (got - want).abs().max() <= 2e-5  # fp32, of order 1
    upstream = torch.randn_like(got)
    got.backward(upstream)
    want.backward(upstream)
    assert (mine.grad - yours.grad).abs().max() <= 2e-5 * yours.grad.abs().max()
    layer = module.layers[0]
    pairs = [(ours.mtp[0].eh_proj, layer.eh_proj), (ours.mtp[0].enorm, layer.enorm)]
    pairs += [(ours.mtp[0].hnorm, layer.hnorm), (ours.mtp[0].shared_head["norm"], layer.post_norm)]
    attention, theirs_attention = ours.mtp[0].block.self_attn, layer.mtp_block.self_attn
    pairs += [(getattr(attention, n), getattr(theirs_attention, n)) for n in ("q_a_proj", "o_proj")]
    for a, b in pairs:
        assert (a.weight.grad - b.weight.grad).abs().max() <= 1e-4 * b.weight.grad.abs().max()


def test_same_text_as_transformers_with_mtp(theirs):
    ours, model, _ = theirs
    prompt = torch.randint(41, (1, 9))
    want = model.generate(
        prompt, use_mtp=True, max_new_tokens=24, do_sample=False, eos_token_id=None
    )
    [got] = ours.generate([prompt[0].tolist()], 24, speculative=True)
    assert got == want[0, 9:].tolist()


def test_cached_module_is_the_whole_pass():
    """Pairs that come one by one, two by two, or all at once: position numbers and all."""
    ours, tokens = deepseek(), torch.randint(41, (2, 12))
    embedded, hidden = ours.embed(tokens[:, 1:]), ours.hidden(tokens)[:, :-1]
    want = ours.mtp[0](embedded, hidden)
    [cache] = ours.new_caches(2, 11, layers=1)
    sizes = [4, 1, 2, 2, 1, 1]
    parts = zip(embedded.split(sizes, 1), hidden.split(sizes, 1), strict=True)
    got = torch.cat([ours.mtp[0](e, h, cache) for e, h in parts], 1)
    assert (got - want).abs().max() <= 1e-5


# Speculation: greedy -------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    new=st.integers(0, 25),
    V=st.integers(2, 5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=40, deadline=None)
def test_greedy_text_is_that_of_plain_decoding(lengths, new, V, seed):
    torch.manual_seed(seed)
    model, prompts = tiny(V=V), prompts_of(V, lengths)
    got, verdicts = mtp.speculative_generate(model, model.mtp[0], prompts, new)
    assert got == model.generate(prompts, new)
    for tokens, row in zip(got, verdicts, strict=True):  # each step writes one or two, but the last
        assert sum(row) + len(row) - (len(tokens) - 1 if new else 0) in (0, 1)


def test_every_split_of_a_text():
    """One text, cut anywhere into prompt and continuation."""
    model = tiny(V=5, layers=1)
    [text] = model.generate([[1]], 20)
    prompts = [([1] + text)[:cut] for cut in range(1, 21)] + prompts_of(5, range(1, 21))
    got, verdicts = mtp.speculative_generate(model, model.mtp[0], prompts, 30)
    assert got == model.generate(prompts, 30)
    assert len({tuple(row) for row in verdicts}) > 3  # rows that drift apart


@pytest.mark.parametrize("worse", ["noise", "zeros", "constant"])
def test_a_corrupted_module_costs_speed_and_nothing_else(worse):
    model, prompts = tiny(V=5), prompts_of(5, (1, 4, 9))
    module = copy.deepcopy(model.mtp[0])
    with torch.no_grad():
        if worse == "noise":
            module.eh_proj.weight.normal_(0, 10)
        else:
            module.shared_head["norm"].weight.fill_(0 if worse == "zeros" else 1e4)
    got, verdicts = mtp.speculative_generate(model, module, prompts, 40)
    assert got == model.generate(prompts, 40)
    assert not all(itertools.chain.from_iterable(verdicts))


def test_rejected_drafts_leave_no_trace_in_the_latent_caches(monkeypatch):
    """What the caches hold at the end is what one pass over the text puts there."""
    model, made = deepseek(replace(TINY, vocab_size=3, eos_token_id=None)), []
    new_caches = model.new_caches

    def watched(*arguments, **more):
        made.append(new_caches(*arguments, **more))
        return made[-1]

    monkeypatch.setattr(model, "new_caches", watched)
    prompts = prompts_of(3, (2, 7, 5))
    got, verdicts = mtp.speculative_generate(model, model.mtp[0], prompts, 30)
    assert any(not v for row in verdicts for v in row) and any(v for row in verdicts for v in row)
    (caches, [module_cache]) = made
    for row, (prompt, new) in enumerate(zip(prompts, got, strict=True)):
        kept = int(caches[0].lengths[row])
        text = torch.tensor([(prompt + new)[: kept + 1]])
        assert len(prompt) + 26 <= kept  # all but the last step's tokens
        fresh = new_caches(1, kept)
        states = model.hidden(text[:, :kept], fresh)
        for ours, want in zip(caches, fresh, strict=True):
            assert (ours.entries[row, :kept] - want.entries[0]).abs().max() <= 1e-4
        held = int(module_cache.lengths[row])
        [want] = new_caches(1, held, layers=1)
        model.mtp[0](model.embed(text[:, 1 : held + 1]), states[:, :held], want)
        assert (module_cache.entries[row, :held] - want.entries[0]).abs().max() <= 1e-4


def test_a_row_is_drafted_for_as_if_it_were_alone():
    """A wrong row of the module's output would draft worse, and nothing else would show it."""
    model, prompts = tiny(V=3), prompts_of(3, (1, 4, 9, 13))
    _, together = mtp.speculative_generate(model, model.mtp[0], prompts, 40)
    alone = [mtp.speculative_generate(model, model.mtp[0], [p], 40)[1][0] for p in prompts]
    assert together == alone
    assert {True, False} == set(itertools.chain.from_iterable(alone))


def test_a_row_ends_with_its_eos():
    model = tiny(V=3)
    prompts = prompts_of(3, (1, 2, 3, 4, 5, 6))
    plain = model.generate(prompts, 30)
    ends = [row.index(2) + 1 if 2 in row else 30 for row in plain]
    assert len(set(ends)) > 1
    got, _ = mtp.speculative_generate(model, model.mtp[0], prompts, 30, eos_token_id=2)
    assert got == [row[:end] for row, end in zip(plain, ends, strict=True)]


# Speculation: sampled ------------------------------------------------------------------------


@given(st.integers(2, 6), st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_accept_or_redraw_draws_from_p(V, seed):
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.rand(2, V, generator=generator, dtype=torch.float64).pow(3)
    p, q = p / p.sum(), q / q.sum()
    assert (mtp.output_distribution(p, q) - p).abs().max() <= EXACT


class Table:
    """A model whose next token depends on the last alone, p (V, V); its module says q (V, V)."""

    def __init__(self, p, q):
        self.p, self.q, self.enorm = p, q, nn.RMSNorm(1)

    def embed(self, tokens):
        return F.one_hot(tokens, len(self.p)).float()

    def hidden(self, tokens, caches):
        return self.p[tokens].log()

    def head(self, states):
        return states

    def new_caches(self, batch, max_tokens, layers=None):
        return [mtp.Slots(batch, max_tokens, 1, self.p)]

    def __call__(self, embedded, hidden, cache):  # the module
        return (embedded @ self.q).log()


def chi_square(counts, expected):
    return ((counts - expected).square() / expected).sum().item()


LIMIT = 49.7  # 26 degrees of freedom exceed it once in 290 runs; the seed is fixed
ROWS = 20_000


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.7, 1.0), (1.0, 0.75)])
def test_sampled_text_has_the_main_models_distribution(temperature, top_p, monkeypatch):
    """Texts of three tokens, all 27 of them; the same test must reject two wrong decoders."""
    p, q = torch.rand(2, 3, 3).square() + 0.02
    table = Table(p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True))
    exact = mtp.probabilities(table.p.log(), temperature, top_p)
    start = exact[0]  # the prompt is [0]
    text = start[:, None, None] * exact[:, :, None] * exact[None, :, :]  # (first, second, third)
    expected = ROWS * text.flatten()

    def counts(table=table):
        new, _ = mtp.speculative_generate(table, table, [[0]] * ROWS, 3, temperature, top_p)
        index = (torch.tensor(new) * torch.tensor([9, 3, 1])).sum(-1)
        return index.bincount(minlength=27)

    got = counts()
    assert got[expected == 0].sum() == 0  # top_p's outcasts never appear
    possible = expected > 0
    assert chi_square(got[possible], expected[possible]) <= LIMIT

    class Accepts:  # stands for torch.rand: takes, or refuses, whatever is drafted
        def __init__(self, value):
            self.value = value

        def __call__(self, B, **_):
            return torch.full((B,), self.value)

    for value in -1.0, math.inf:
        monkeypatch.setattr(torch, "rand", Accepts(value))
        with torch.no_grad():
            wrong = counts()
        monkeypatch.undo()
        off = chi_square(wrong[possible], expected[possible])
        assert off > 2 * LIMIT or wrong[~possible].sum() > 0


def test_a_draft_refused_by_rounding_alone_is_drawn_from_p(monkeypatch):
    """p and q are equal but for rounding: nothing of p may be left above q."""
    p = torch.randn(3000, 3)
    logits, q_logits = p[:, None].repeat(1, 2, 1), p + 5 * torch.rand(3000, 1)
    largest = lambda B, **_: torch.full((B,), 1 - 2.0**-24)
    monkeypatch.setattr(torch, "rand", largest)
    draft = torch.zeros(3000, dtype=torch.int64)
    taken, following = mtp.accept_or_redraw(draft, q_logits, logits, 1.0)
    assert not taken.all() and following.max() <= 2


@pytest.mark.parametrize("draft, logits", [((1,), (2, 2, 5)), ((2,), (2, 3, 5)), ((2,), (2, 2, 4))])
def test_judging_refuses_other_shapes(draft, logits):
    with pytest.raises(ValueError, match=r"want draft \(B,\)"):
        index = torch.zeros(draft, dtype=torch.int64)
        mtp.accept_or_redraw(index, torch.randn(2, 5), torch.randn(logits), 0.0)


def test_the_same_seed_draws_the_same_text():
    model, prompts = tiny(), prompts_of(13, (3, 5))
    settings = dict(max_new_tokens=20, temperature=0.8, top_p=0.9)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return mtp.speculative_generate(
            model, model.mtp[0], prompts, generator=generator, **settings
        )

    assert draw(1) == draw(1) != draw(2)


def test_probabilities():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    assert mtp.probabilities(logits, 0.0).tolist() == [[1, 0, 0, 0]]
    assert torch.equal(mtp.probabilities(logits, 0.5), (2 * logits).softmax(-1))
    nucleus = mtp.probabilities(logits, 1.0, 0.7)  # 0.64 alone is less than 0.7
    assert torch.allclose(nucleus, torch.tensor([[0.7311, 0.2689, 0, 0]]), atol=1e-4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(prompts=[]), "at least one token"),
        (dict(prompts=[[1], []]), r"\[1, 0\]"),
        (dict(temperature=-1.0), "-1.0"),
        (dict(top_p=0.0), "0.0"),
        (dict(temperature=math.nan), "nan"),
        (dict(temperature=1e-39), "1e-39"),
        (dict(max_new_tokens=-1), "-1"),
        (dict(module=None), "no MTP module"),
    ],
)
def test_speculation_refuses(arguments, message):
    model = tiny()
    given = dict(module=model.mtp[0], prompts=[[1]], max_new_tokens=3) | arguments
    with pytest.raises(ValueError, match=message):
        mtp.speculative_generate(model, **given)


# In 06 ---------------------------------------------------------------------------------------


def test_the_main_model_is_the_same_without_its_module(tmp_path):
    ours = deepseek()
    ours.save_pretrained(tmp_path)
    plain = chapter.DeepSeek.from_pretrained(tmp_path, with_mtp=False)
    assert plain.config == replace(TINY, num_nextn_predict_layers=0) and not plain.mtp
    tokens = torch.randint(41, (2, 20))
    assert torch.equal(plain(tokens), ours(tokens))


def test_module_survives_a_checkpoint(tmp_path):
    ours = deepseek(replace(TINY, num_nextn_predict_layers=2))
    ours.save_pretrained(tmp_path)
    again = chapter.DeepSeek.from_pretrained(tmp_path)
    assert again.config == ours.config
    pairs = zip(again.state_dict().items(), ours.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def test_the_released_names(tmp_path):
    from safetensors.torch import load_file

    ours = deepseek()
    ours.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    names = {n.removeprefix("model.layers.3.") for n in stored if n.startswith("model.layers.3.")}
    extras = {"enorm.weight", "hnorm.weight", "eh_proj.weight", "shared_head.norm.weight"}
    extras |= {"embed_tokens.weight", "shared_head.head.weight"}
    block = {n.removeprefix("model.layers.2.") for n in stored if n.startswith("model.layers.2.")}
    assert names == extras | block
    embedding = stored["model.layers.3.embed_tokens.weight"]
    assert torch.equal(embedding, stored["model.embed_tokens.weight"])
    assert torch.equal(stored["model.layers.3.shared_head.head.weight"], stored["lm_head.weight"])


def test_a_head_of_the_modules_own_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    deepseek().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    stored["model.layers.3.shared_head.head.weight"] += 1
    save_file(stored, file)
    with pytest.raises(ValueError, match="shared_head.head.weight is not lm_head.weight"):
        chapter.DeepSeek.from_pretrained(tmp_path)
    assert not chapter.DeepSeek.from_pretrained(tmp_path, with_mtp=False).mtp


def test_losses_are_the_two_losses():
    model, rows = deepseek(), torch.randint(2, 41, (2, 15))
    rows[0, 6] = rows[1, 3] = TINY.eos_token_id
    loss, further = model.losses(rows, 0.3)
    want = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
    assert abs(loss - want) <= 1e-5
    documents = (rows == TINY.eos_token_id).cumsum(1)
    hidden = model.hidden(rows[:, :-1])
    want = mtp.mtp_loss(model.mtp, model.embed, model.head, hidden, rows, 0.3, documents)
    assert abs(further - want) <= 1e-5
    assert abs(further - mtp.mtp_loss(model.mtp, model.embed, model.head, hidden, rows, 0.3)) > 1e-3
    plain = deepseek(replace(TINY, num_nextn_predict_layers=0))
    assert plain.losses(rows, 0.3)[1] == 0.0


def test_a_step_trains_the_module_and_its_bias():
    """A training framework forgot the MTP layers' biases: the hook ran over the main layers."""
    model = chapter.DeepSeek(TINY).train()
    recipe = chapter.Recipe(10, context=16, batch_size=4, bias_update_speed=0.01)
    optimizer = chapter.make_optimizer(model, recipe)
    before = copy.deepcopy(model.state_dict())
    rows = torch.randint(41, (4, 17))
    _, drafting, loads = chapter.training_step(model, optimizer, recipe, [rows], 1.0, 0.3)
    assert loads.shape == (3, 8) and loads.sum(-1).tolist() == [4 * 16 * 3, 4 * 16 * 3, 4 * 15 * 3]
    assert abs(drafting / 0.3 * 16 / 15 - math.log(41)) < 1.0
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert "mtp.0.block.mlp.gate.e_score_correction_bias" in changed
    assert {n for n, _ in model.named_parameters() if n.startswith("mtp.")} <= changed


def test_weight_falls_to_a_third():
    recipe = chapter.Recipe(10, context=16, batch_size=4)
    assert [recipe.mtp_weight_at(d) for d in (0.0, 0.66)] == [0.3, 0.3]
    assert recipe.mtp_weight_at(0.67) == pytest.approx(0.1)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_generate_speculates(temperature):
    model = deepseek(replace(TINY, vocab_size=4))
    prompts = prompts_of(4, (1, 5, 11))
    got = model.generate(prompts, 25, temperature, speculative=True)
    assert [len(row) for row in got] == [25, 25, 25]
    if temperature == 0:
        assert got == model.generate(prompts, 25)


def test_generate_refuses_without_a_module():
    model = deepseek(replace(TINY, num_nextn_predict_layers=0))
    with pytest.raises(ValueError, match="no MTP module"):
        model.generate([[1]], 4, speculative=True)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        deepseek().generate([[1]], 128, speculative=True)


# The measures --------------------------------------------------------------------------------


def test_kinds_of_tokens():
    kinds = mtp.kinds_of("if x1 == 0x2f:")
    spans = [(kind, len(list(group))) for kind, group in itertools.groupby(kinds)]
    want = (
        "keyword 2, space 1, identifier 2, space 1, punctuation 2, space 1, number 4, punctuation 1"
    )
    assert ", ".join(f"{kind} {n}" for kind, n in spans) == want


def test_guesses_are_told_apart_by_the_token_that_was_right():
    """Tokens " return", " x", "\\n", "0": the drafts are of the second, then of the fourth."""
    words = {0: "def f():\n", 1: " return", 2: " x", 3: "\n", 4: "0"}
    decode = lambda tokens: "".join(words[token] for token in tokens)
    found = mtp.guesses_of([[0]], [[1, 2, 3, 4]], [[True, False]], decode)
    assert [(g.position, g.kind, g.accepted) for g in found] == [
        (1, "identifier", True),
        (3, "number", False),
    ]


def test_rates_of_a_perfect_and_of_a_blind_module():
    model, tokens = tiny(), torch.randint(13, (2, 12))

    class Copies(nn.Module):  # knows the main model's next state
        def forward(self, embedded, hidden):
            assert torch.equal(embedded, model.embed(tokens[:, 1:]))
            assert torch.equal(hidden, model.hidden(tokens)[:, :-1])
            return model.hidden(tokens)[:, 1:]

    same, overlap = mtp.rates_on(model, Copies(), tokens)
    assert same == 1.0 and overlap == pytest.approx(1.0, abs=1e-6)
    same, overlap = mtp.rates_on(model, model.mtp[0], tokens)
    assert same < 1 and overlap < 1


def test_race_says_how_many_times_as_fast(monkeypatch):
    """6 s against 4 s, of which the prompt takes 3 and 2: 3 s against 2."""
    model = tiny()

    def seconds(task, prompt, length):
        task(prompt, length)
        return {"plain": 3.0, "speculate": 2.0}[task.__name__] * (2 if length > 1 else 1)

    monkeypatch.setattr(mtp, "seconds", seconds)
    monkeypatch.setattr(mtp, "costs", lambda *a, **b: {"plain": 0.5})
    arguments = model, model.mtp[0], prompts_of(13, (3, 4, 5)), 9
    ratio, acceptance, cost = mtp.race(*arguments, rounds=2)
    assert ratio == 1.5 and 0 <= acceptance <= 1 and cost == {"plain": 0.5}


def test_gap_of_logits_where_two_texts_part():
    model = tiny()
    [plain] = model.generate([[1, 2]], 6)
    other = plain[:3] + [(plain[3] + 1) % 13] + plain[4:]
    logits = model(torch.tensor([[1, 2, *plain[:3]]]))[0, -1]
    want = (logits[plain[3]] - logits[other[3]]).item()
    assert want > 0 and mtp.logit_gap(model, [1, 2], plain, other) == pytest.approx(want)
    assert mtp.logit_gap(model, [1, 2], plain, plain) == 0


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
def test_recorded_steps_write_the_same_texts(device):
    """Alone and together, prompts of all lengths: on a CPU a step is called instead of replayed."""
    model = deepseek().to(device)
    graphs, module = bench.Graphs(model), model.mtp[0]
    for prompts in prompts_of(41, (1, 9, 40)), prompts_of(41, (30,)), prompts_of(41, (2, 2, 2)):
        for new in 50, 1, 50:  # the last finds all that it needs recorded
            want = model.generate(prompts, new)
            wanted = mtp.speculative_generate(model, module, prompts, new)
            got = graphs.generate(prompts, new)
            drafted, verdicts = graphs.speculative_generate(model, module, prompts, new)
            for texts in zip(prompts * 2, want * 2, got + drafted, strict=True):
                assert mtp.logit_gap(model, *texts) <= (0 if device == "cpu" else 1e-2)
            if device == "cpu":
                assert (drafted, verdicts) == wanted
    # a row that has ended runs on the spot: its caches are full, with no slot beyond
    prompts = [[1] * 206, *prompts_of(41, (30, 100))]
    want, seen = mtp.speculative_generate(model, module, prompts, 50)
    assert len(set(map(len, seen))) > 1  # they end one after another
    got, verdicts = graphs.speculative_generate(model, module, prompts, 50)
    assert device == "cuda" or (got, verdicts) == (want, seen)
    sizes = {(key[0].__name__, *key[-2:]) for key in graphs.made}
    assert sizes == {(kind, B, 256) for kind in ("Plain", "Speculative") for B in (1, 3)}
    worse = mtp.corrupted(module, 3.0)
    want, seen = mtp.speculative_generate(model, worse, prompts, 50)
    got, verdicts = graphs.speculative_generate(model, worse, prompts, 50)
    assert device == "cuda" or (got, verdicts) == (want, seen)  # not the first module's steps
    cost = graphs.costs(model, module, prompts[0], rounds=3)
    assert cost["draft1"] == cost["draft2"] and min(cost.values()) > 0


def test_expected_speedup():
    cost = {"plain": 1.0, "verify": 1.2, "draft1": 0.2, "draft2": 0.3}
    assert mtp.expected_speedup(0.0, cost) == pytest.approx(1 / 1.4)
    assert mtp.expected_speedup(1.0, cost) == pytest.approx(2 / 1.5)


def test_a_nucleus_ends_where_it_holds_enough():
    """Four tokens of a quarter each: two hold a half, a third is not asked."""
    assert (mtp.probabilities(torch.zeros(4), 1.0, 0.5) > 0).sum() == 2
    logits = torch.randn(50).bfloat16()
    want = (logits.float() / 0.7).softmax(-1)
    assert torch.equal(mtp.probabilities(logits, 0.7), want)


def test_a_corrupted_module_is_a_copy():
    module = tiny().mtp[0]
    before = module.eh_proj.weight.clone()
    worse = mtp.corrupted(module, 2.0)
    assert torch.equal(module.eh_proj.weight, before)
    assert not torch.equal(worse.eh_proj.weight, before)


def test_the_first_rounds_of_a_race_warm_up(monkeypatch):
    """Of costs three, of texts one."""
    model, calls = tiny(), itertools.count()
    monkeypatch.setattr(mtp, "seconds", lambda *_: 9.0 if next(calls) < 3 * 4 else 1.0)
    assert set(mtp.costs(model, model.mtp[0], [1, 2], rounds=2).values()) == {1.0}

    def seconds(task, prompt, length):
        task(prompt, length)
        return {"plain": 3.0, "speculate": 2.0 if len(prompt) > 3 else 0.1}[task.__name__] * length

    monkeypatch.setattr(mtp, "seconds", seconds)
    monkeypatch.setattr(mtp, "costs", lambda *a, **b: {"plain": 0.5})
    ratio, *_ = mtp.race(model, model.mtp[0], prompts_of(13, (3, 4)), 9, rounds=1)
    assert ratio == 1.5


def test_what_ends_a_text():
    for one in 5, [5], (5,), {5}, torch.tensor(5):
        assert mtp.ends_of(one) == {5}
    assert mtp.ends_of([5, 6]) == {5, 6} and mtp.ends_of(None) == {None}
    for ends in "5", 5.0, ["5"]:
        with pytest.raises(TypeError, match="want the id of a token"):
            mtp.ends_of(ends)
