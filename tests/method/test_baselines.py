"""The published baselines, against independent implementations of their papers, image by image and token by token."""

import math
from itertools import pairwise

import pytest
import timm
import torch
import torch.nn.functional as F
from families import KINDS, images, make
from hypothesis import given
from hypothesis import strategies as st

from token_merge_plugin import ConfigError, MergeConfig, apply, remove
from token_merge_plugin.builtin import create_reference_model, load_images
from token_merge_plugin.config import METHODS, late_weights, spread
from token_merge_plugin.method import reduction
from token_merge_plugin.method.merging import bipartite, bipartite_rounds, follow, merge, pseudo_random
from token_merge_plugin.trial.counting import count_macs
from token_merge_plugin.trial.tracing import trace

BASELINES = METHODS[1:]


@pytest.fixture(scope="module")
def deit():
    torch.manual_seed(0)
    model = timm.create_model("deit_small_patch16_224").eval()
    # Larger than at the start of training, so that attention is not flat and mistakes show.
    for block in model.blocks:
        block.attn.qkv.weight.data *= 4
    return model


@pytest.fixture(scope="module")
def photos():
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def attend(block, x, size):
    """Return what the attention adds to x [T, C], the mean keys [T, C / H], the attention and the values."""
    layer = block.attn
    q, k, v = layer.qkv(block.norm1(x)).reshape(len(x), 3, layer.num_heads, -1).permute(1, 2, 0, 3)
    logits = q @ k.transpose(1, 2) / math.sqrt(q.shape[2])
    if size is not None:
        logits = logits + torch.tensor(size).log()
    attention = logits.softmax(dim=-1)
    return layer.proj((attention @ v).transpose(0, 1).flatten(1)), k.mean(dim=0), attention, v


def embed(model, image):
    x = model.patch_embed(image[None])[0]
    return torch.cat((model.cls_token[0], x)) + model.pos_embed[0]


def merge_pairs(x, size, keys, r):
    """Merge r pairs by bipartite soft matching: ToMe, section 3 of the paper."""
    even, odd = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    pairs = []
    for a in even[1:]:  # the class token is at position 0
        similarity = torch.cosine_similarity(keys[a], keys[odd]).tolist()
        pairs.append((max(similarity), a, odd[similarity.index(max(similarity))]))
    pairs = sorted(pairs, reverse=True)[: min(r, (len(x) - 1) // 2)]
    token, weight = {i: x[i] * size[i] for i in range(len(x))}, dict(enumerate(size))
    for _, a, b in pairs:
        token[b], weight[b] = token[b] + token.pop(a), weight[b] + weight.pop(a)
    order = [i for i in even if i in token] + odd
    return torch.stack([token[i] / weight[i] for i in order]), [weight[i] for i in order]


def tome(model, image, numbers):
    """ToMe, section 3 and figure 2 of the paper, with lists and loops; `numbers` of tokens merged block by block."""
    x, size = embed(model, image), None
    for block, r in zip(model.blocks, numbers, strict=True):
        update, keys, _, _ = attend(block, x, size)
        x = x + update
        if r:  # otherwise the order stays, too
            x, size = merge_pairs(x, size or [1.0] * len(x), keys, r)
        x = x + block.mlp(block.norm2(x))
    return model.head(model.norm(x)[0])


def ppt(model, image, keep_rate, threshold):
    """PPT: the output, the variances of the scores, and at each of three stages whether tokens were pruned."""
    x, size, variances, pruned = embed(model, image), None, [], []
    for index, block in enumerate(model.blocks):
        update, keys, attention, values = attend(block, x, size)
        x = x + update
        if index in (3, 6, 9):
            size = size or [1.0] * len(x)
            scores = []
            for token in range(1, len(x)):
                scores.append((attention[:, 0, token].mean() * values[:, token].norm()).item())
            scores = [score / sum(scores) for score in scores]
            mean = sum(scores) / len(scores)
            variances.append(sum((score - mean) ** 2 for score in scores) / (len(scores) - 1))
            pruned.append(variances[-1] > threshold)
            keep = math.ceil(keep_rate * len(scores))
            if pruned[-1]:
                best = sorted(range(len(scores)), key=lambda i: -scores[i])[:keep]
                kept = [0] + [1 + i for i in sorted(best)]
                x, size = x[kept], [size[i] for i in kept]
            else:
                x, size = merge_pairs(x, size, keys, len(scores) - keep)
        x = x + block.mlp(block.norm2(x))
    return model.head(model.norm(x)[0]), variances, pruned


def evit(model, image, keep_rate, fuse):
    """EViT, section 3 of the paper: attentive tokens stay, the others are fused into one, or dropped."""
    x = embed(model, image)
    for index, block in enumerate(model.blocks):
        update, _, attention, _ = attend(block, x, None)
        x = x + update
        if index in (3, 6, 9):
            paid = attention[:, 0, 1:].mean(dim=0)
            order = paid.argsort(descending=True)
            kept, rest = order.split((math.ceil(keep_rate * len(paid)), len(paid) - math.ceil(keep_rate * len(paid))))
            fused = (paid[rest, None] * x[1 + rest]).sum(dim=0, keepdim=True)
            x = torch.cat((x[:1], x[1 + kept], fused[: int(fuse)]))
        x = x + block.mlp(block.norm2(x))
    return model.head(model.norm(x)[0])


def assert_close(output, expected):
    assert (output - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("r", [8, 13])
@torch.no_grad()
def test_tome_is_that_of_its_paper(deit, photos, r):
    expected = torch.stack([tome(deit, image, [r] * 12) for image in photos])
    unpatched = deit(photos)
    assert_close(apply(deit, method="tome", r=r)(photos), expected)
    assert (unpatched - expected).norm() > 0.01 * expected.norm()
    remove(deit)


@torch.no_grad()
def test_late_tome_is_tome_with_numbers_that_grow_with_the_square_of_the_depth(deit, photos):
    apply(deit, 0.8, method="late_tome")
    counts = {stage.block: len(stage.representative) for stage in trace(deit, photos[:1])}
    tokens = [196]
    for block in range(12):
        tokens.append(counts.get(block, tokens[-1]))
    numbers = [before - after for before, after in pairwise(tokens)]
    last = numbers[7] / 64  # block 7 is the eighth
    for block, number in enumerate(numbers):
        assert number == pytest.approx(min(last * (block + 1) ** 2, tokens[block] // 2), abs=2)
    output = deit(photos)
    remove(deit)
    assert_close(output, torch.stack([tome(deit, image, numbers) for image in photos]))


@pytest.mark.parametrize("keep_rate", [0.7, 0.5])
@torch.no_grad()
def test_ppt_is_that_of_its_paper_image_by_image(deit, photos, keep_rate, monkeypatch):
    unpatched = deit(photos)
    variances = [ppt(deit, image, keep_rate, math.inf)[1] for image in photos]
    between = (variances[0][0] + variances[1][0]) / 2
    for threshold in (0, between, math.inf):
        outputs, _, pruned = zip(*(ppt(deit, image, keep_rate, threshold) for image in photos), strict=True)
        first = {0: {True}, between: {True, False}, math.inf: {False}}  # whether the images' first stage prunes
        assert {of_image[0] for of_image in pruned} == first[threshold]
        monkeypatch.setattr(reduction, "PPT_THRESHOLD", threshold)
        expected = torch.stack(outputs)
        assert_close(apply(deit, keep_rate, method="ppt")(photos), expected)
        remove(deit)
        assert (unpatched - expected).norm() > 0.01 * expected.norm()


@pytest.mark.parametrize("keep_rate", [0.7, 0.5])
@pytest.mark.parametrize("method", ["evit", "prune"])
@torch.no_grad()
def test_evit_is_that_of_its_paper_fused_and_not(deit, photos, method, keep_rate):
    expected = torch.stack([evit(deit, image, keep_rate, method == "evit") for image in photos])
    unpatched = deit(photos)
    assert_close(apply(deit, keep_rate, method=method)(photos), expected)
    assert (unpatched - expected).norm() > 0.01 * expected.norm()
    remove(deit)


@torch.no_grad()
def test_tome_merges_down_to_one_token_and_then_stops():
    model = timm.create_model("test_vit").eval()
    x = torch.randn(2, *model.default_cfg["input_size"])
    output = model(x)
    assert apply(model, method="tome", r=10_000)(x).shape == output.shape
    assert torch.equal(apply(model, method="tome", r=0)(x), output)


@given(
    tokens=st.integers(2, 12),
    prefix=st.integers(0, 3),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_bipartite_matching_merges_the_best_pairs_of_even_and_odd_positions(tokens, prefix, share, seed):
    descriptors = torch.randn(1, tokens, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    merged = round(share * (tokens // 2))
    crucial, rest, target = (x[0].tolist() for x in bipartite(descriptors, tokens - merged, prefix)[:3])
    cosine = torch.cosine_similarity(descriptors[0, :, None], descriptors[0, None], dim=2)
    even = [i for i in range(tokens) if (prefix + i) % 2 == 0]
    odd = [i for i in range(tokens) if (prefix + i) % 2 == 1]
    partner = {i: max(odd, key=lambda j: cosine[i, j].item()) for i in even}
    best = sorted(even, key=lambda i: -cosine[i, partner[i]].item())[:merged]
    assert sorted(rest) == sorted(best)
    assert crucial == [i for i in even if i not in best] + odd
    assert [crucial[t] for t in target] == [partner[i] for i in rest]


@given(
    tokens=st.integers(2, 24),
    prefix=st.integers(0, 2),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_more_than_half_the_tokens_merge_in_rounds_of_bipartite_matching(tokens, prefix, share, seed):
    x = torch.randn(2, tokens, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.double)
    size, keep = torch.ones(2, tokens), 1 + round(share * (tokens - 2))
    assignment = bipartite_rounds(x, size, keep, prefix)
    token_map = torch.arange(tokens).expand(2, -1)
    once, once_size = merge(x, size, assignment)
    twice, twice_size, in_rounds = x, size, token_map
    while twice.shape[1] > keep:
        left = max(keep, (twice.shape[1] + 1) // 2)
        of_round = bipartite(twice, left, prefix)
        in_rounds = follow(in_rounds, of_round)
        twice, twice_size = merge(twice, twice_size, of_round)
    assert once.shape[1] == keep
    assert torch.allclose(once, twice)
    assert torch.equal(once_size, twice_size)
    assert torch.equal(follow(token_map, assignment), in_rounds)
    index = torch.cat((assignment.crucial, assignment.rest), dim=1).sort(dim=1).values
    assert torch.equal(index, token_map)


@given(depth=st.integers(1, 48), rate=st.floats(0.5, 1), late=st.booleans())
def test_tokens_spread_over_the_blocks_leave_the_work_of_the_stages(depth, rate, late):
    stages = {depth * quarter // 4: rate for quarter in (1, 2, 3)}
    weights = late_weights(depth) if late else [1.0] * depth

    def work(rates):
        total, share = 0.0, 1.0
        for of_block in rates:
            total, share = total + share / 3, share * of_block
            total += share * 2 / 3
        return total

    rates = spread(stages, weights, least=0.5)
    assert min(rates) >= 0.5
    assert work(rates) == pytest.approx(work([stages.get(block, 1.0) for block in range(depth)]))
    shares = torch.tensor([1.0, *rates], dtype=torch.double).cumprod(0)
    merged = -shares.diff() / torch.tensor(weights, dtype=torch.double)
    less_than_half = torch.tensor(rates) > 0.5
    assert torch.allclose(merged[less_than_half], merged[:1])
    assert (merged <= merged[0] + 1e-9).all()


def test_pseudo_random_numbers_look_drawn_at_random():
    index = torch.arange(196)
    orders = torch.stack([pseudo_random(index, block).argsort().argsort() for block in range(12)]).float()
    correlation = torch.corrcoef(torch.cat((index[None].float(), orders)))
    assert (correlation - torch.eye(13)).abs().max() < 0.3
    assert len(pseudo_random(index, 3).unique()) == len(index)


@pytest.mark.parametrize("method", BASELINES)
@torch.no_grad()
def test_every_sequence_family_takes_the_baselines_or_says_why_not(method):
    served = 0
    for kind in KINDS:
        model, x = make(kind).double(), images(kind).double()  # no ties that rounding decides
        unpatched = model(x)
        try:
            apply(model, 0.6, method=method)
        except ConfigError as error:
            refusal = str(error)
        else:
            refusal = None
        if refusal is not None:
            assert f"method={method!r}" in refusal
            assert torch.equal(model(x), unpatched)
            continue
        served += 1
        output = model(x)
        assert output.shape == unpatched.shape
        assert output.isfinite().all()
        assert not torch.equal(output, unpatched)
        if kind != "CrossViT" or method not in ("tome", "late_tome", "ppt"):
            # CrossViT goes on with what was restored: among exact doubles, rounding chooses the one to merge with.
            assert torch.allclose(model(x[:1]), output[:1]), kind
        assert torch.equal(remove(model)(x), unpatched)
    assert served >= 5


@pytest.mark.parametrize("method", BASELINES)
@torch.no_grad()
def test_baselines_keep_the_grid_for_dense_outputs(method):
    model = timm.create_model("test_vit").eval()
    x = torch.randn(2, *model.default_cfg["input_size"])
    features = model.forward_features(x)
    apply(model, 0.5, method=method)
    assert model.forward_features(x).shape == features.shape
    final, intermediates = model.forward_intermediates(x)
    assert final.shape == features.shape
    assert all(y.isfinite().all() for y in intermediates)


@torch.no_grad()
def test_average_pooling_sees_only_the_tokens_that_pruning_keeps():
    model = timm.create_model("test_vit2").eval()  # pools the mean of the image tokens
    model.norm = torch.nn.Identity()
    x = torch.randn(2, *model.default_cfg["input_size"])
    grid = apply(model, {0: 0.5}, method="random").forward_features(x)
    for tokens in grid[:, model.num_prefix_tokens :]:
        values, counts = tokens.unique(dim=0, return_counts=True)
        kept = values[counts == 1]  # the patches whose token was dropped share one value
        assert len(kept) == math.ceil(0.5 * len(tokens))
        assert torch.allclose(values[counts > 1][0], kept.mean(dim=0), atol=1e-4)
        assert torch.allclose(tokens.mean(dim=0), kept.mean(dim=0), atol=1e-4)


@pytest.mark.parametrize("method", BASELINES)
def test_baselines_compile_without_graph_breaks_and_train(method):
    model = timm.create_model("test_vit").eval()
    x = torch.randn(2, *model.default_cfg["input_size"])
    apply(model, 0.6, method=method)
    expected = model(x)
    expected.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(x), expected, atol=1e-5)


def test_the_methods_leave_the_same_compute_at_one_keep_rate():
    model, (x, _) = create_reference_model(), load_images()
    macs = {m: count_macs(apply(model, 0.7, method=m), x[:1]) for m in METHODS}
    least = min(macs.values())
    # Attention is not linear in the tokens, and late numbers leave more of it.
    assert macs.pop("late_tome") < 1.07 * least
    # Merging compares all tokens with each other in five stages, which counts in a model with so few channels.
    assert macs.pop("merge") < 1.06 * least
    assert max(macs.values()) < 1.04 * least


def test_the_baselines_move_the_output_further_than_merging_does_on_the_built_in_model():
    model, (x, _) = create_reference_model(), load_images()
    x = x[:300]
    moved = {}
    with torch.inference_mode():
        unpatched = model(x).log_softmax(1)
        for method in METHODS:
            output = apply(model, 0.5, method=method)(x).log_softmax(1)
            moved[method] = F.kl_div(output, unpatched, log_target=True, reduction="batchmean").item()
    assert moved["merge"] < moved["tome"] < min(value for name, value in moved.items() if name not in ("merge", "tome"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "magic"}, "method='magic' is not known"),
        ({"method": "evit", "r": 3}, "option of method 'tome'"),
        ({"method": "late_tome", "r": 3}, "option of method 'tome'"),
        ({"r": 3}, "option of method 'tome'"),
        ({"method": "tome", "r": -1}, "0 or more"),
        ({"method": "tome", "r": 2.5}, "0 or more"),
        ({"method": "tome", "r": 8, "keep_rate": 0.5}, "same thing twice"),
        ({"method": "tome", "similarity": "values"}, "option of method 'merge'"),
        ({"method": "prune", "importance": "uniform"}, "option of method 'merge'"),
    ],
)
def test_options_that_a_method_does_not_have_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        MergeConfig(**options)


@pytest.mark.parametrize("method", ["evit", "ppt", "prune"])
def test_a_model_without_a_class_token_cannot_keep_what_it_attends_to(method):
    model = timm.create_model("test_vit2")
    with pytest.raises(ConfigError, match="class token"):
        apply(model, 0.7, method=method)


@pytest.mark.parametrize("method", ["tome", "late_tome", "ppt"])
def test_methods_that_match_halves_of_the_tokens_refuse_attention_masks(method):
    model = apply(timm.create_model("test_vit").eval(), 0.7, method=method)
    x = torch.randn(1, *model.default_cfg["input_size"])
    tokens = model.patch_embed.num_patches + model.num_prefix_tokens
    with pytest.raises(ConfigError, match=f"'{method}' is not defined with an attention mask"):
        model(x, attn_mask=torch.ones(1, 1, tokens, tokens, dtype=torch.bool))
