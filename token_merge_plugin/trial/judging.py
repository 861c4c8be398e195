"""Is token merging worth it here? What a trial's results say, in one plain sentence."""

import math
from collections.abc import Callable, Sequence

from token_merge_plugin.errors import counted
from token_merge_plugin.trial.results import TrialResult, TrialRow, patched

# What a loss may come to, and still be called tolerable: 0.5 points of top-1, 1 % of the predictions, 0.01 of cosine,
# 10 % of the patch tokens' length. On a pretrained ViT with a dense head that moves the head's probabilities by 0.012.
TOLERANCES = {"top-1": 0.005, "agreement": 0.01, "cosine": 0.01, "patch error": 0.1}
# A speed-up below this is not worth a change.
WORTHWHILE = 1.05
# Speeds that differ by less than this share are equal: they vary by as much from run to run.
SPEED_NOISE = 0.02
# In fewer images, even a loss that was never seen may be above one point (3 / n, the rule of three).
ENOUGH_IMAGES = 300
WIDEST_INTERVAL = 0.01


def measure_of(result: TrialResult) -> str | None:
    """Return what the loss is measured by: a key of `TOLERANCES`, or None where nothing was classified.

    Nothing is said of random weights. Top-1 for labelled images, unless the unpatched model gets no more of them right
    than chance would; else the agreement with the unpatched
    model; else, for models without classes, what is read of them. Where a head was given, or where the model returns
    its tokens as they are, that is the error of the patch tokens; else the cosine similarity of the pooled features.
    """
    rows = patched(result)
    measures = [name for name in TOLERANCES if any(loss(result, row, name) is not None for row in rows)]
    if "patch error" in measures and any(row.head_change is not None for row in rows):
        return "patch error"
    return next(iter(measures), None)


def loss(result: TrialResult, row: TrialRow, measure: str | None) -> float | None:
    """Return what the row loses against the unpatched model by a measure of `TOLERANCES`: 0 is nothing."""
    if not result.trained:
        return None
    if measure == "top-1":
        return None if row.top1_difference is None or not _is_above_chance(result) else -row.top1_difference
    if measure == "patch error":
        return row.patch_error
    value = {"agreement": row.agreement, "cosine": row.cosine}.get(measure or "")
    return None if value is None else 1 - value


def best_row(result: TrialResult, measure: str | None = None) -> TrialRow | None:
    """Return the row that the verdict recommends, by the rule of `verdict`; None if it recommends none.

    Args:
        measure: what the loss is to be measured by; None for `measure_of`.
    """
    rows = _tolerable(result, measure or measure_of(result))
    if not any(row.speed_up is not None for row in patched(result)):
        return _preferred(rows, lambda row: row.reduction)
    return _preferred([row for row in rows if _is_fast(row)], lambda row: row.speed_up or 0.0)


def verdict(result: TrialResult) -> str:
    """Say in one plain sentence whether token merging helps here; more sentences only for what limits it.

    The rule: a loss is tolerable if top-1 falls by at most 0.5 points; where there is no top-1, if the prediction stays
    the same for at least 99 % of the images; for models without classes, if the features have a mean cosine similarity
    of at least 0.99 with the unpatched ones; where a head was given, or where the model returns its tokens without
    pooling them, if the patch tokens have a mean relative error of at most 10 %. Of the rows whose loss is tolerable,
    the fastest is recommended, over all methods, if it is at least 1.05x as fast as the unpatched model, and the
    confidence interval of its speed-up is above 1. Rows within 2 % of the fastest are equally fast, and of those
    `merge` is preferred. Where no speed was measured, the row with the fewest multiply-adds stands in.
    """
    return " ".join([headline(result), *caveats(result)])


def headline(result: TrialResult) -> str:
    """Return the one sentence of `verdict`."""
    return _judge(result)[1]


def caveats(result: TrialResult) -> list[str]:
    """Return the further sentences of `verdict`.

    Whether the trial was interrupted, whether weights or labels cannot be right, what may be wrong with the images,
    whether there were too few images to tell (fewer than 300, or a confidence interval wider than +-1 point), and,
    where a model without classes was judged by its pooled features, what to choose for a head that reads the patch
    tokens, if that is another row.
    """
    row, _ = _judge(result)
    found = []
    if result.images < result.total_images:
        found.append(f"The trial was interrupted after {result.images:,} of {counted(result.total_images, 'image')}.")
    if not result.trained:
        found.append("The weights are random: what merging costs trained ones was not measured.")
    elif result.labelled and result.rows and result.rows[0].top1 is not None and not _is_above_chance(result):
        right = "gets no label right"
        if result.rows[0].top1:
            right = f"is no better than chance, with {result.rows[0].top1:.1%} of the images right"
        found.append(f"The unpatched model {right}: are the labels those of its classes?")
    return [*found, *result.warnings, *_doubts(result, row)]


def _judge(result: TrialResult) -> tuple[TrialRow | None, str]:
    """Return the row that the sentence is about, and the sentence."""
    rows = patched(result)
    if not rows and result.refused:
        return None, "Token merging cannot be used on this model: every method that was asked for is refused."
    measure = measure_of(result)
    if rows and not result.trained and not any(row.speed_up for row in rows):
        return None, "Nothing can be said of the accuracy of random weights."
    if not rows or (measure is None and not any(row.speed_up for row in rows)):
        return None, "Nothing can be said yet: no patched model was measured."
    if measure is None:
        row = max(rows, key=lambda row: row.speed_up or 0.0)
        return row, f"{_name(row)} runs {_how_fast(result, row)}; what it costs was not measured."
    best = best_row(result)
    if best is not None:
        if best.speed_up is not None:
            gain = f"{_how_fast(result, best)}."
        else:
            gain = f"with {100 * best.reduction:.0f} % less computation; its speed was not measured."
        return best, f"{_name(best)} {_what_stays(result, best, measure)} {gain}"
    row, reason = _why_nothing_helps(result, measure)
    return row, f"Token merging does not help here: {reason}"


def _why_nothing_helps(result: TrialResult, measure: str) -> tuple[TrialRow, str]:
    tolerable = _tolerable(result, measure)
    losses = {row: lost for row in patched(result) if (lost := loss(result, row, measure)) is not None}
    if not tolerable:
        mildest = max(row.keep_rate or 0.0 for row in losses)
        row = min((row for row in losses if (row.keep_rate or 0.0) == mildest), key=lambda row: losses[row])
        higher = " Higher keep rates were not tried." if 0 < mildest < 0.9 else ""
        return row, f"at {_name(row, start=False)} {_what_is_lost(losses[row], measure, ' already')}.{higher}"
    timed = [row for row in tolerable if row.speed_up is not None]
    what = {
        "top-1": "the accuracy stays",
        "agreement": "the predictions stay",
        "cosine": "the features stay",
        "patch error": "the patch tokens stay",
    }[measure]
    if not timed:
        return tolerable[0], f"{what} at {_name(tolerable[0], start=False)}, but its speed was not measured."
    row = max(timed, key=lambda row: row.speed_up or 0.0)
    fast = [other for other in losses if _is_fast(other)]
    if fast:
        other = min(fast, key=lambda row: losses[row])
        return other, (
            f"as long as {what}, the model runs at {row.speed_up:.2f}x the speed at best; at "
            f"{_name(other, start=False)}, {other.speed_up:.2f}x, {_what_is_lost(losses[other], measure)}."
        )
    return row, (
        f"{what}, but the model is not faster on this device: {_times(row.speed_up, row.speed_up_interval)} at best, "
        f"with {100 * row.reduction:.0f} % less computation, at batch size {result.batch_size}."
    )


def _is_fast(row: TrialRow) -> bool:
    """Return whether the row is worth a change, and surely faster than the unpatched model."""
    low = 0.0 if row.speed_up is None else row.speed_up if row.speed_up_interval is None else row.speed_up_interval[0]
    return (row.speed_up or 0.0) >= WORTHWHILE and low > 1


def _how_fast(result: TrialResult, row: TrialRow) -> str:
    """Say the speed-up; and that of a single image, where the row is slower there."""
    text = f"at {_times(row.speed_up, row.speed_up_interval, ' the speed')}"
    slowest = row.latency_speed_up
    if slowest is not None and row.latency_speed_up_interval is not None:
        slowest = row.latency_speed_up_interval[1]
    if slowest is not None and slowest < 1 and result.batch_size > 1:
        text += f" in batches of {result.batch_size}, but at {row.latency_speed_up:.2f}x at batch size 1"
    return text


def _times(speed_up: float | None, interval: tuple[float, float] | None, what: str = "") -> str:
    text = f"{speed_up:.2f}x{what}"
    return text if interval is None else f"{text} (95 %: {interval[0]:.2f}x to {interval[1]:.2f}x)"


def _is_above_chance(result: TrialResult) -> bool:
    """Return whether the unpatched model gets surely more images right than guesses would: by two standard errors."""
    top1 = result.rows[0].top1
    if not top1 or not result.images:
        return False
    chance = 1 / result.num_classes if result.num_classes else 0.0
    return top1 > chance + 2 * math.sqrt(chance * (1 - chance) / result.images)


def _doubts(result: TrialResult, row: TrialRow | None) -> list[str]:
    """Return what makes the sentence about a row unsure."""
    measure = measure_of(result)
    if row is None or measure is None:
        return []
    found = []
    if measure == "cosine" and row == best_row(result) and not _is_tolerable(row.patch_error):
        found.append(_advice_for_heads(result))
    few = f"{counted(result.images, 'image')} {'is' if result.images == 1 else 'are'} too few to be sure"
    if measure == "top-1" and row.top1_interval is not None:
        half = (row.top1_interval[1] - row.top1_interval[0]) / 2
        if half > WIDEST_INTERVAL:
            return [*found, f"{few}: the difference is uncertain by {100 * half:.1f} points either way."]
    return [*found, f"{few}."] if result.images < ENOUGH_IMAGES else found


def _is_tolerable(patch_error: float | None) -> bool:
    return patch_error is None or patch_error <= TOLERANCES["patch error"]


def _advice_for_heads(result: TrialResult) -> str:
    row = best_row(result, "patch error")
    advice = "no setting that was tried is recommended"
    if row is not None:
        advice = f"{_name(row, start=False)} is recommended: it {_what_stays(result, row, 'patch error')}"
        if row.speed_up is not None:
            advice += f" at {row.speed_up:.2f}x the speed"
    return f"For a head that reads the patch tokens, where up to 10 % are tolerable, {advice}."


def _tolerable(result: TrialResult, measure: str | None) -> list[TrialRow]:
    rows = []
    for row in patched(result):
        lost = loss(result, row, measure)
        # 1e-9 undoes float noise: 1 - 0.99 is a little more than 0.01.
        if measure is not None and lost is not None and lost <= TOLERANCES[measure] + 1e-9:
            rows.append(row)
    return rows


def _preferred(rows: Sequence[TrialRow], gain: Callable[[TrialRow], float]) -> TrialRow | None:
    """Return the row of the largest gain; `merge` if it gains about as much."""
    if not rows:
        return None
    largest = max(map(gain, rows))
    merging = [row for row in rows if row.method == "merge" and gain(row) >= largest * (1 - SPEED_NOISE)]
    return max(merging or rows, key=gain)


def setting_of(row: TrialRow) -> str:
    """Return, for example, "keep rate 0.7"."""
    if row.keep_rate is not None:
        return f"keep rate {row.keep_rate:g}"
    return "this setting" if row.setting is None else f"setting {row.setting}"


def _name(row: TrialRow, start: bool = True) -> str:
    name = setting_of(row)
    if row.method != "merge":
        name = f"method {row.method} at {name}" if start else f"{name} with method {row.method}"
    return name[0].upper() + name[1:] if start else name


def _what_stays(result: TrialResult, row: TrialRow, measure: str) -> str:
    if measure in ("cosine", "patch error"):
        moved = [] if row.patch_error is None else [f"the patch tokens by {100 * row.patch_error:.1f} %"]
        moved += [] if row.head_change is None else [f"the head's output by {row.head_change:.3g}"]
        moves = [f"moves {' and '.join(moved)}"] if moved else []
        if measure == "cosine":
            moves.insert(0, f"gives features with a cosine similarity of {row.cosine:.3f} to the unpatched ones")
        return " and ".join(moves)
    if measure == "agreement":
        assert row.agreement is not None
        return f"gives the same prediction for {_share(row.agreement)} the images"
    unpatched = result.rows[0].top1
    assert row.top1 is not None
    assert unpatched is not None
    return f"keeps {_share(row.top1 / unpatched)} the accuracy"


def _share(share: float) -> str:
    """Write a share so that only a whole one reads as all, and "of" follows where it belongs."""
    if share >= 1:
        return "all of"
    return f"{100 * share:.1f} % of" if share < 0.9995 else "over 99.9 % of"


def _what_is_lost(lost: float, measure: str, already: str = "") -> str:
    if measure == "top-1":
        return f"the model is{already} {100 * lost:.1f} points less accurate"
    if measure == "agreement":
        return f"the predictions are{already} different for {100 * lost:.1f} % of the images"
    if measure == "patch error":
        return f"the patch tokens are{already} {100 * lost:.1f} % off"
    return f"the features are{already} down to a cosine similarity of {1 - lost:.3f}"
