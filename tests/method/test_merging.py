"""Property tests of the tensor functions, against formulas written with loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity as torch_cosine

from token_merge_plugin.config import tokens_kept
from token_merge_plugin.method.merging import (
    NEIGHBOURS,
    PROHIBITIVE,
    RIDGE,
    Assignment,
    Undo,
    assign,
    cells,
    cosine_similarity,
    follow,
    interpolation,
    join_windows,
    match,
    merge,
    merge_cost,
    pad_to_windows,
    patch_offset,
    restore,
    split,
    take,
    undo,
    windows,
    without_diagonal,
)
from token_merge_plugin.method.reduction import merge_within


@st.composite
def cases(draw):
    """(tokens [B, T, C], size [B, T], score [B, T], keep), in double precision."""
    batch, tokens, channels = draw(st.integers(1, 3)), draw(st.integers(2, 20)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(batch, tokens, channels, generator=generator, dtype=torch.double)
    size = torch.randint(1, 9, (batch, tokens), generator=generator).double()
    # Few distinct values, so that ties occur.
    score = torch.randint(0, draw(st.integers(2, 50)), (batch, tokens), generator=generator).double()
    return x, size, score, draw(st.integers(1, tokens - 1))


def by_score(x, score, keep):
    crucial, rest = split(score, keep)
    return Assignment(crucial, rest, *match(1 - cosine_similarity(x), crucial, rest))


@given(cases())
def test_crucial_tokens_are_the_best_k_in_the_order_of_the_image(case):
    x, _, score, keep = case
    crucial, rest = split(score, keep)
    for b in range(len(x)):
        assert crucial[b].tolist() == sorted(crucial[b].tolist())
        assert sorted(crucial[b].tolist() + rest[b].tolist()) == list(range(x.shape[1]))
        assert len(crucial[b]) == keep
        assert score[b, crucial[b]].min() >= score[b, rest[b]].max()


@given(cases())
def test_every_other_token_goes_to_the_crucial_token_most_similar_to_it(case):
    x, _, score, keep = case
    crucial, rest, target, _ = by_score(x, score, keep)
    for b in range(len(x)):
        for i, j in zip(rest[b], target[b], strict=True):
            similarity = [torch_cosine(x[b, i], x[b, c], dim=0) for c in crucial[b]]
            assert similarity[j] >= max(similarity) - 1e-12


@given(cases())
def test_merged_tokens_are_means_weighted_with_sizes(case):
    x, size, score, keep = case
    crucial, rest, target, _ = by_score(x, score, keep)
    merged, merged_size = merge(x, size, Assignment(crucial, rest, target))
    for b in range(len(x)):
        for k in range(keep):
            group = [crucial[b, k].item(), *rest[b][target[b] == k].tolist()]
            weight = size[b, group]
            torch.testing.assert_close(merged_size[b, k], weight.sum())
            torch.testing.assert_close(merged[b, k], (weight[:, None] * x[b, group]).sum(0) / weight.sum())


@given(cases())
def test_merged_tokens_are_as_long_as_what_they_are_made_of_on_average(case):
    x, size, score, keep = case
    assignment = by_score(x, score, keep)
    means, _ = merge(x, size, assignment)
    merged, _ = merge(x, size, assignment, keep_norms=True)
    for b in range(len(x)):
        for k in range(keep):
            group = [assignment.crucial[b, k].item(), *assignment.rest[b][assignment.target[b] == k].tolist()]
            weight = size[b, group]
            length = (weight * x[b, group].square().sum(1).sqrt()).sum() / weight.sum()
            torch.testing.assert_close(merged[b, k], means[b, k] * length / means[b, k].square().sum().sqrt())


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float])
def test_tokens_that_cancel_each_other_are_merged_into_none(dtype):
    x = torch.tensor([[[3.0, 4.0], [-3.0, -4.0], [100.0, 0.0]]], dtype=dtype)
    assignment = Assignment(torch.tensor([[0, 2]]), torch.tensor([[1]]), torch.tensor([[0]]))
    merged, _ = merge(x, torch.ones(1, 3), assignment, keep_norms=True)
    assert torch.equal(merged, torch.tensor([[[0.0, 0.0], [100.0, 0.0]]], dtype=dtype))


@given(cases())
def test_sizes_sum_to_the_number_of_patches(case):
    x, size, score, keep = case
    _, merged_size = merge(x, size, by_score(x, score, keep))
    torch.testing.assert_close(merged_size.sum(1), size.sum(1))


@given(cases())
def test_the_weighted_sum_of_tokens_is_kept(case):
    x, size, score, keep = case
    merged, merged_size = merge(x, size, by_score(x, score, keep))
    torch.testing.assert_close((merged_size[:, :, None] * merged).sum(1), (size[:, :, None] * x).sum(1))


@given(cases(), st.booleans())
def test_a_token_that_takes_no_other_is_left_exactly_as_it_is(case, keep_norms):
    x, size, score, keep = case
    x, size = x.float(), size.float()
    assignment = by_score(x, score, keep)
    merged, _ = merge(x, size, assignment, keep_norms)
    for b in range(len(x)):
        for k in set(range(keep)) - set(assignment.target[b].tolist()):
            assert torch.equal(merged[b, k], x[b, assignment.crucial[b, k]])


@given(cases())
def test_the_token_map_is_a_partition_that_agrees_with_the_sizes_over_several_merges(case):
    x, _, score, keep = case
    batch, patches, _ = x.shape
    token_map = torch.arange(patches).expand(batch, -1)
    size = torch.ones(batch, patches, dtype=torch.double)
    for k in (keep, max(1, keep // 2)):
        assignment = by_score(x, score, k) if k < x.shape[1] else None
        if assignment is None:
            break
        x, size = merge(x, size, assignment)
        score = score.gather(1, assignment.crucial)
        token_map = follow(token_map, assignment)
        for b in range(batch):
            assert token_map[b].bincount(minlength=k).tolist() == size[b].tolist()


@given(cases())
def test_restore_gives_each_patch_the_token_that_holds_it(case):
    x, size, score, keep = case
    assignment = by_score(x, score, keep)
    merged, _ = merge(x, size, assignment)
    token_map = follow(torch.arange(x.shape[1]).expand(len(x), -1), assignment)
    restored = restore(merged, token_map)
    for b in range(len(x)):
        for patch in range(x.shape[1]):
            assert torch.equal(restored[b, patch], merged[b, token_map[b, patch]])


@given(cases(), st.booleans())
def test_merging_equal_tokens_and_restoring_changes_nothing(case, keep_norms):
    x, size, score, keep = case
    x = torch.cat((x, 1 + x[:, :, :1] ** 2), dim=2)  # no two tokens parallel, even with one channel
    copies = torch.arange(x.shape[1]) % keep
    x = x[:, copies]
    score[:, :keep] += 100
    assignment = by_score(x, score, keep)
    merged, _ = merge(x, size, assignment, keep_norms)
    token_map = follow(torch.arange(x.shape[1]).expand(len(x), -1), assignment)
    torch.testing.assert_close(restore(merged, token_map), x)


def merged_and_noted(x, size, score, keep, real=None, cost=None):
    """The tokens behind a merge, and what it takes to undo it; with a cost, which tells the neighbours."""
    assignment = by_score(x, score, keep)
    if cost is not None:
        crucial, rest, *_ = assignment
        assignment = Assignment(crucial, rest, *match(cost, crucial, rest, NEIGHBOURS))
    merged, _ = merge(x, size, assignment, keep_norms=True)
    token_map = torch.arange(x.shape[1]).expand(len(x), -1)
    return merged, Undo(x, merged, assignment, token_map, *interpolation(x, merged, assignment, real))


@given(cases())
def test_undoing_a_merge_behind_no_block_changes_nothing(case):
    x = case[0]
    merged, noted = merged_and_noted(*case)
    torch.testing.assert_close(undo(merged, noted), x)
    holder = follow(noted.token_map, noted.assignment)
    torch.testing.assert_close(patch_offset(noted) + take(merged, holder), x)


@given(cases(), st.booleans())
def test_tokens_that_were_merged_have_updates_in_between_and_others_their_own(case, told):
    x, _, _, keep = case
    cost = torch.randn(len(x), x.shape[1], x.shape[1]) if told else None
    merged, noted = merged_and_noted(*case, cost=cost)
    update = torch.randn_like(merged)
    found = undo(merged + update, noted) - x
    crucial, rest, target, _ = (x if x is None else x.tolist() for x in noted.assignment)

    def in_between(b, k, i, pair):
        """The update of token i, one of the two that are merged token k: the first went, the other stayed."""
        others = [j for j in range(keep) if j != k]
        far = [cost[b, pair[0], crucial[b][j]] if told else (x[b, pair[0]] - merged[b, j]).norm() for j in range(keep)]
        nearest = sorted(others, key=far.__getitem__)[:NEIGHBOURS]
        ways = [merged[b, j] - merged[b, k] for j in nearest]
        ridge = RIDGE * sum((x[b, j] - merged[b, k]).square().sum() for j in pair)
        steps = [1.5 / (sum((way @ other).abs() for other in ways) + ridge) for way in ways]
        shares = [torch.zeros(())] * len(ways)
        for _ in range(4):
            left = x[b, i] - merged[b, k] - sum(share * way for share, way in zip(shares, ways, strict=True))
            slopes = [way @ left for way in ways]
            shares = [share + step * slope for share, step, slope in zip(shares, steps, slopes, strict=True)]
        differences = [update[b, j] - update[b, k] for j in nearest]
        return update[b, k] + sum(share * other for share, other in zip(shares, differences, strict=True))

    for b in range(len(x)):
        for k, i in enumerate(crucial[b]):
            took = [r for r, t in zip(rest[b], target[b], strict=True) if t == k]
            expected = in_between(b, k, i, (took[0], i)) if took else update[b, k]
            torch.testing.assert_close(found[b, i], expected, rtol=1e-3, atol=1e-4)
        for i, k in zip(rest[b], target[b], strict=True):
            expected = in_between(b, k, i, (i, crucial[b][k]))
            torch.testing.assert_close(found[b, i], expected, rtol=1e-3, atol=1e-4)


@given(cases(), st.floats(-3, 3))
def test_where_all_tokens_get_the_same_update_all_patches_do(case, value):
    merged, noted = merged_and_noted(*case)
    torch.testing.assert_close(undo(merged + value, noted), case[0] + value)


def test_an_update_that_is_linear_along_a_line_is_found_but_for_what_four_steps_leave():
    x = torch.tensor([[[0.0], [1.0], [2.0], [30.0]]], dtype=torch.double)
    assignment = Assignment(torch.tensor([[0, 3]]), torch.tensor([[1, 2]]), torch.tensor([[0, 0]]))
    merged, _ = merge(x, torch.ones(1, 4), assignment)  # 1 and 30
    noted = Undo(x, merged, assignment, torch.arange(4)[None], *interpolation(x, merged, assignment))
    missed = undo(3 * merged, noted)[0, :, 0] - 3 * x[0, :, 0]
    beyond = torch.tensor([1, 0, 1, 0])  # each step leaves half of the way; and there is the ridge
    torch.testing.assert_close(missed.abs(), beyond * 2 / 16.0, rtol=1e-2, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16, torch.float])
def test_equal_tokens_and_large_ones_are_undone_without_nan(dtype):
    x = torch.tensor([[[1.0, 2.0]] * 4 + [[3e4, -3e4], [1.0, 2.0]]], dtype=dtype)
    assignment = Assignment(torch.tensor([[0, 1, 2]]), torch.tensor([[3, 4, 5]]), torch.tensor([[0, 0, 2]]))
    merged = take(x, assignment.crucial)
    sources, shares = interpolation(x, merged, assignment)
    assert shares.isfinite().all()
    assert shares.abs().max() <= 1 + 4 * NEIGHBOURS * 1.5 / (2 * RIDGE**0.5)
    noted = Undo(x, merged, assignment, torch.arange(6)[None], sources, shares)
    assert torch.equal(undo(merged, noted), x)
    assert torch.equal(undo(2 * merged, noted), torch.cat((2 * x[:, :4], x[:, 4:5] + x[:, :1], 2 * x[:, 5:]), dim=1))


@given(cases(), st.integers(0, 19))
def test_padding_is_no_neighbour(case, number):
    x, size, score, keep = case
    real = torch.arange(x.shape[1]) >= min(number, x.shape[1])
    real = real.expand(len(x), -1)
    _, noted = merged_and_noted(x, size, score, keep, real)
    crucial, rest, *_ = noted.assignment
    stays, went = real.gather(1, crucial), real.gather(1, rest)
    for b in range(len(x)):
        for i, (sources, shares) in enumerate(zip(noted.sources[b], noted.shares[b], strict=True)):
            alien = stays[b, sources[1:]] != went[b, i]
            assert not shares[:, 1:][:, alien].any()


@pytest.mark.parametrize("channels", [5, 64, 384])
def test_rounding_does_not_decide_which_of_two_tokens_goes_that_are_nearest_to_each_other(channels):
    x = 1000 + torch.randn(3, 80, channels)
    weight = torch.rand(3, 80) + 0.5
    cost = merge_cost(x, weight)
    assert torch.equal(cost, cost.transpose(1, 2))
    nearest = cost.argmin(dim=2)
    _, rest, *_ = assign(cost, 79 / 80)
    for b in range(3):
        (i,) = rest[b].tolist()
        assert nearest[b, nearest[b, i]] == i < nearest[b, i]


@given(cases())
def test_the_cost_of_a_merge_is_what_it_adds_to_the_squared_error(case):
    x, size = case[:2]
    cost = merge_cost(x, size)
    for b in range(len(x)):
        for i in range(x.shape[1]):
            assert cost[b, i, i] >= PROHIBITIVE
            for j in range(i):
                mean = (size[b, i] * x[b, i] + size[b, j] * x[b, j]) / (size[b, i] + size[b, j])
                error = size[b, i] * (x[b, i] - mean).square().sum() + size[b, j] * (x[b, j] - mean).square().sum()
                assert cost[b, i, j].item() == pytest.approx(error.item(), rel=1e-3, abs=1e-4)


def test_the_cost_of_a_merge_is_in_single_precision_whatever_the_tokens_are_in():
    x = 300 * torch.randn(1, 40, 64)
    size = torch.ones(1, 40)
    expected = merge_cost(x.half(), size)
    assert (expected < PROHIBITIVE).sum() == 40 * 39
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(merge_cost(x.half(), size), expected)
    distance = torch.cdist(x.half().double(), x.half().double()).square() / 2
    torch.testing.assert_close(expected.double(), without_diagonal(distance), rtol=1e-3, atol=1)


def costs(case):
    """Costs of merging each pair, without ties but those of two tokens that are nearest to each other."""
    x, size, score, _ = case
    cost = merge_cost(torch.cat((x, score[:, :, None]), dim=2), size)
    return torch.minimum(
        cost, cost.transpose(1, 2)
    )  # which differ by rounding, which a reference in doubles does not see


def assigned_by_loops(cost, number):
    """Which of the tokens go, by `assign`'s description, in a list of sets, one for each round."""
    tokens = range(len(cost))

    def by_price(sees):
        price = {i: min((cost[i][j] for j in tokens if j != i and sees(i, j)), default=math.inf) for i in tokens}
        return sorted(tokens, key=lambda i: price[i] * (1 + 1e-6 * i))

    order = by_price(lambda i, j: True)
    for round_ in range(3):
        going = order[:number] if round_ > 0 else []
        place = {i: -1 if i in going else order.index(i) for i in tokens}
        order = by_price(lambda i, j, place=place: place[j] > place[i])
    return set(order[:number])


@given(cases())
def test_the_tokens_that_go_are_those_whose_merges_cost_least(case):
    x, _, _, keep = case
    cost = costs(case)
    crucial, rest, target, _ = assign(cost, keep / x.shape[1])
    assert torch.equal(target, match(cost, crucial, rest)[0])
    for b in range(len(x)):
        assert set(rest[b].tolist()) == assigned_by_loops(cost[b].tolist(), x.shape[1] - keep)
        assert sorted(crucial[b].tolist() + rest[b].tolist()) == list(range(x.shape[1]))


def test_what_is_lost_is_close_to_merging_the_cheapest_pair_again_and_again():
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(30, 8, generator=generator)
    x = (centres[torch.randint(0, 30, (120,), generator=generator)] + torch.randn(120, 8, generator=generator))[None]
    ones = torch.ones(1, 120)

    def lost(groups):
        return sum((x[0, list(group)] - x[0, list(group)].mean(dim=0)).square().sum() for group in groups).item()

    for keep in (100, 80, 60):
        greedy = [{i} for i in range(120)]
        while len(greedy) > keep:
            means = torch.stack([x[0, list(group)].mean(dim=0) for group in greedy])
            sizes = torch.tensor([[float(len(group)) for group in greedy]])
            i, j = divmod(merge_cost(means[None], sizes).argmin().item(), len(greedy))
            greedy[i] |= greedy.pop(j) if j > i else set()
            if j < i:
                greedy[j] |= greedy.pop(i)
        crucial, rest, target, _ = assign(merge_cost(x, ones), keep / 120)
        mine = [{c} | set(rest[0][target[0] == k].tolist()) for k, c in enumerate(crucial[0].tolist())]
        assert lost(mine) < 1.1 * lost(greedy)


@given(cases())
def test_equal_tokens_go_before_any_other_does(case):
    x, size, _, keep = case
    x = torch.cat((x, 1 + x[:, :, :1] ** 2), dim=2)[:, torch.arange(x.shape[1]) % keep]
    crucial, rest, target, _ = assign(merge_cost(x, torch.ones_like(size)), keep / x.shape[1])
    # Costs are in single precision: tokens that differ by less than that are equal.
    torch.testing.assert_close(take(x, rest), take(x, crucial.gather(1, target)), rtol=1e-3, atol=1e-3)


@given(cases())
def test_padding_changes_neither_which_tokens_stay_nor_where_the_others_go(case):
    x, _, _, keep = case
    keep_rate = keep / x.shape[1]
    padding = 1 + keep
    cost = costs(case)
    alone = assign(cost, keep_rate)
    tokens = x.shape[1] + padding
    padded = torch.zeros(len(x), tokens, tokens)
    padded[:, : x.shape[1], : x.shape[1]] = cost
    real = torch.arange(tokens).expand(len(x), -1) < x.shape[1]
    crucial, rest, target, _ = assign(without_diagonal(padded), keep_rate, real)
    assert crucial.shape[1] == tokens_kept(tokens, keep_rate)
    takes = crucial.gather(1, target)
    assert torch.equal(real.gather(1, takes), real.gather(1, rest)) or crucial.shape[1] == alone.crucial.shape[1]
    for b in range(len(x)):
        assert [i for i in crucial[b].tolist() if real[b, i]] == alone.crucial[b].tolist()
        goes = {i: j for i, j in zip(rest[b].tolist(), takes[b].tolist(), strict=True) if real[b, i]}
        expected = alone.crucial[b, alone.target[b]].tolist()
        assert goes == dict(zip(alone.rest[b].tolist(), expected, strict=True))


@given(cases(), st.booleans())
def test_an_image_does_not_depend_on_the_others_of_its_batch(case, keep_norms):
    x, size, score, keep = case
    together = merge(x, size, by_score(x, score, keep), keep_norms)
    for b in range(len(x)):
        one = slice(b, b + 1)
        alone = merge(x[one], size[one], by_score(x[one], score[one], keep), keep_norms)
        torch.testing.assert_close(alone[0], together[0][one])
        assert torch.equal(alone[1], together[1][one])


@given(cases(), st.booleans())
def test_a_token_of_size_zero_adds_nothing_to_the_token_that_takes_it(case, keep_norms):
    x, size, score, keep = case
    padding = torch.zeros_like(size, dtype=torch.bool)
    padding[:, -max(1, x.shape[1] // 3) :] = True
    size = size.masked_fill(padding, 0)
    assignment = by_score(x, score, keep)
    merged, merged_size = merge(x, size, assignment, keep_norms)
    merged_noise, _ = merge(torch.where(padding[:, :, None], x + 100, x), size, assignment, keep_norms)
    real = merged_size > 0
    assert torch.equal(merged[real], merged_noise[real])


@given(cases(), st.booleans())
def test_gradients_of_a_merge_agree_with_finite_differences(case, keep_norms):
    x, size, score, keep = case
    assignment = by_score(x, score, keep)
    token_map = follow(torch.arange(x.shape[1]).expand(len(x), -1), assignment)
    assert torch.autograd.gradcheck(
        lambda x: restore(merge(x, size, assignment, keep_norms)[0], token_map), (x[:, :, :2].clone().requires_grad_(),)
    )


@pytest.mark.parametrize("keep_norms", [False, True])
def test_half_precision_does_not_overflow_where_many_large_tokens_merge(keep_norms):
    x = torch.full((1, 200, 4), 60_000.0, dtype=torch.half)
    size = torch.ones(1, 200)
    merged, _ = merge(x, size, by_score(x, torch.rand(1, 200), 1), keep_norms)
    assert torch.isfinite(merged).all()
    torch.testing.assert_close(merged.float(), torch.full((1, 1, 4), 60_000.0), rtol=2e-3, atol=0)


@given(st.integers(1, 40), st.integers(1, 40))
def test_cells_are_rectangles_that_hold_each_token_once(height, width):
    index = cells(height, width)
    assert sorted(index.flatten().tolist()) == list(range(height * width))
    for cell in index:
        rows, columns = cell // width, cell % width
        assert (rows.max() - rows.min() + 1) * (columns.max() - columns.min() + 1) == len(cell)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_windows_are_cut_row_by_row_and_joined_again(batch, rows, columns, height, width):
    grid = torch.randn(batch, rows * height, columns * width, 2)
    cut = windows(grid, height, width)
    for b in range(batch):
        for i in range(rows):
            for j in range(columns):
                window = grid[b, i * height : (i + 1) * height, j * width : (j + 1) * width]
                assert torch.equal(cut[(b * rows + i) * columns + j], window.reshape(-1, 2))
    assert torch.equal(join_windows(cut, height, width, (rows * height, columns * width)), grid)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 4))
def test_grids_are_padded_with_equal_values_until_windows_fill_them(rows, columns, height, width):
    grid = torch.randn(2, rows, columns, 3)
    padded, real = pad_to_windows(grid, height, width)
    more = (padded.shape[1] - rows, padded.shape[2] - columns)
    assert 0 <= more[0] < height
    assert 0 <= more[1] < width
    assert torch.equal(padded[:, :rows, :columns], grid)
    if more == (0, 0):
        assert real is None
        return
    is_real = join_windows(real, height, width, padded.shape[1:3])[0, :, :, 0] == 1
    assert is_real.sum() == rows * columns
    assert is_real[:rows, :columns].all()
    assert len(padded[:, ~is_real].flatten().unique()) == 1


@given(
    st.integers(1, 3), st.sampled_from([(7, 7), (8, 16), (12, 12), (5, 3)]), st.floats(0.05, 0.95), st.integers(0, 99)
)
def test_merging_within_cells_is_a_partition_of_each_window(batch, grid_size, keep_rate, seed):
    patches = grid_size[0] * grid_size[1]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, patches, 4, generator=generator).double()
    tokens, merged = merge_within(x, grid_size, keep_rate)
    index = cells(*grid_size)
    kept = len(index) * tokens_kept(index.shape[1], keep_rate)
    assert tokens.shape == (batch, kept, 4)
    own = merged.token_map.gather(1, merged.representative)
    assert torch.equal(own, torch.arange(kept).expand(batch, -1))  # a token holds its representative
    for b in range(batch):
        assert merged.token_map[b].bincount(minlength=kept).tolist() == merged.size[b].tolist()
        for k in range(kept):
            held = (merged.token_map[b] == k).nonzero()[:, 0]
            torch.testing.assert_close(tokens[b, k], x[b, held].mean(0))
            assert sum(set(held.tolist()) <= set(cell.tolist()) for cell in index) == 1


@given(st.integers(0, 99), st.floats(0.3, 0.95))
def test_tokens_that_are_to_stay_apart_are_not_merged(seed, keep_rate):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, 49, 4, generator=generator)
    region = torch.randint(0, 3, (2, 49), generator=generator)  # two windows an image, two images
    _, merged = merge_within(x, (7, 7), keep_rate, region[:, :, None] != region[:, None, :])
    for window in range(4):
        for token in range(merged.size.shape[1]):
            assert len(set(region[window % 2][merged.token_map[window] == token].tolist())) == 1
