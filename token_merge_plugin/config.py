"""What the user may ask for: `MergeConfig`, its validation, and the way from keep rates to token counts."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Literal, TypeAlias, TypedDict, get_args

from token_merge_plugin.errors import ConfigError

KeepRate: TypeAlias = float | Sequence[float] | Mapping[int, float]
# What a stage does: the share of its tokens that stays (a float), or the number of tokens that go (an int).
Amount: TypeAlias = float | int

Method: TypeAlias = Literal["merge", "tome", "late_tome", "evit", "ppt", "prune", "random"]
Schedule: TypeAlias = Literal["equal_numbers", "equal_rates"]
Importance: TypeAlias = Literal["auto", "class_attention", "uniform"]
Similarity: TypeAlias = Literal["tokens", "mean_keys", "keys", "values"]
MultiScale: TypeAlias = Literal["off", "importance", "descriptors", "learned"]
METHODS: tuple[str, ...] = get_args(Method)
SCHEDULES: tuple[str | None, ...] = (None, *get_args(Schedule))
IMPORTANCE: tuple[str, ...] = get_args(Importance)
SIMILARITY: tuple[str | None, ...] = (None, *get_args(Similarity))
MULTI_SCALE: tuple[str, ...] = get_args(MultiScale)
# Of the methods: reduce tokens a little in every block; choose by the class token's attention; may drop tokens for
# good; may attend in proportion to the tokens' sizes.
EVERY_BLOCK = ("tome", "late_tome")
BY_CLASS_ATTENTION = ("evit", "ppt", "prune")
DROPPING = ("ppt", "prune", "random")
PROPORTIONAL = ("merge", "tome", "late_tome", "ppt")
# Equal numbers: no stage merges a larger share of its tokens than this, unless all do. Where not even three stages of
# equal rates do, these lose as little in equal time on a pretrained ViT-S (examples/results/tradeoff.md), and less on
# the built-in model.
LARGEST_CUT = 0.2
# Equal numbers: so many tokens the first stage merges of what each other one does. On a pretrained ViT-S a third to a
# half lose as little as all, and for its classifier a third is better (examples/results/dense.md, classifier.md).
FIRST_STAGE = 1 / 3
# From so many patches on, 28 x 28, tokens are told apart by the means of their keys. On a pretrained ViT-S that errs
# more up to 24 x 24, and less at 32 x 32 (examples/results/resolution.md).
MANY_PATCHES = 784


class MergeOptions(TypedDict, total=False):
    """The options of `apply` beside the keep rate, for type checkers and editors; `MergeConfig` documents them."""

    method: Method
    r: int | None
    stages: Sequence[int] | None
    schedule: Schedule | None
    importance: Importance
    similarity: Similarity | None
    multi_scale: MultiScale
    proportional_attention: bool
    num_prefix_tokens: int | None


@dataclass(frozen=True)
class MergeConfig:
    """Options of `apply`; everything but `keep_rate` has a measured default.

    Attributes:
        keep_rate: how many of the image tokens stay, in (0, 1]. One float is the share that each stage keeps. For equal
            numbers, and for "tome" and "late_tome", which reduce tokens a little in every block, it asks for the work
            that the default stages would leave with it. A sequence has one share for each stage, and a mapping {block
            index: rate} also says where the stages are.
        method: "merge" is this package's own. The others are published baselines to compare it with, whose further
            options are fixed: "tome" (Bolya et al. 2023), "late_tome" (as "tome", with numbers of merged tokens that
            grow with the square of the depth: LaterIsBetter), "evit" (Liang et al. 2022), "ppt" (Wu et al. 2023:
            image by image, drops tokens or merges them), "prune" (as "evit", but the tokens that do not stay are
            dropped) and "random" (as "prune", in a pseudo-random order of the patches).
        r: of "tome" only, and instead of keep_rate: how many tokens each block merges, at most half of them.
        stages: indices of the blocks that reduce tokens, counted through the whole network; None for the schedule's
            own.
        schedule: how one float becomes the shares of the stages. "equal_numbers": each stage merges as many tokens,
            but at most a fifth of those that it has, or the same share, a larger one, where that leaves too much work;
            if no stages are given, four at odd twelfths of the depth (blocks 1, 3, 5 and 7 of 12), of which the first
            merges a third as many as the others. "equal_rates": each stage keeps the share `keep_rate`; three stages
            at 1/4, 1/2 and 3/4 of the depth, or those that a family does best with, if none are given. None: equal
            rates from a keep rate of 0.8 on, where stages are given, where blocks give back the grid, or with learned
            fusion; else equal numbers.
        importance: whose attention says how much an image token matters. "auto": that of the class token, if there is
            one, and that of 16 image tokens, evenly spaced, which stand for all; where tokens are merged before they
            attend, nobody's. "class_attention": that of the class token alone (and of DeiT's distillation token).
            "uniform": nobody's, what a merge loses decides alone.
        similarity: descriptors by which is told what a merge loses: "tokens" (as they leave the attention's residual),
            "keys" or "values" of all heads, or "mean_keys", the keys' mean over heads, which ToMe compares. None: mean
            keys in ViTs whose positions are an embedding added to the tokens, where the grid is known to have 28 x 28
            patches or more; else tokens.
        multi_scale: where features of several scales of the patch grid are fused in: "off", "importance" or
            "descriptors", where they help to choose tokens, which stay as they are; or "learned", into the tokens in
            front of the first stage, by depthwise convolutions whose gates start at zero: to be trained. Their
            parameters join the model's `state_dict`, with "token_merge_fusion" in their names.
        proportional_attention: attend to a merged token as often as to the patches it stands for (ToMe, Bolya et
            al. 2023, section 3). Of "merge", "tome", "late_tome" and "ppt"; always off in the others.
        num_prefix_tokens: tokens in front of the patches, which are never merged, where others were added to the
            model's own, such as prompts: the number of all, the class token included. None for the model's own.

    Raises:
        ConfigError: an option has a value that is not allowed.
    """

    keep_rate: KeepRate = field(default=0.7, hash=False)
    method: str = "merge"
    r: int | None = None
    stages: Sequence[int] | None = None
    schedule: str | None = None
    importance: str = "auto"
    similarity: str | None = None
    multi_scale: str = "off"
    proportional_attention: bool = True
    num_prefix_tokens: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_rate", _checked_keep_rate(self.keep_rate))
        if self.stages is not None:
            object.__setattr__(self, "stages", _checked_stages(self.stages))
        if isinstance(self.keep_rate, Mapping) and self.stages is not None:
            raise ConfigError("keep_rate is a mapping, which already names the blocks: leave stages out.")
        if isinstance(self.keep_rate, tuple) and self.stages and len(self.keep_rate) != len(self.stages):
            raise ConfigError(_wrong_number(self.keep_rate, self.stages))
        if self.schedule is not None and not isinstance(self.keep_rate, float):
            raise ConfigError(
                f"schedule={self.schedule!r} says what one keep rate means, but there is one for each stage: leave "
                "schedule out."
            )
        for name, allowed in (
            ("method", METHODS),
            ("schedule", SCHEDULES),
            ("importance", IMPORTANCE),
            ("similarity", SIMILARITY),
            ("multi_scale", MULTI_SCALE),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name}={value!r} is not known. Choose one of {', '.join(map(repr, allowed))}.")
        if not isinstance(self.proportional_attention, bool):
            raise ConfigError(
                f"proportional_attention={self.proportional_attention!r} is not a bool. Give True or False."
            )
        extra = self.num_prefix_tokens
        if extra is not None and (not isinstance(extra, Integral) or isinstance(extra, bool) or extra < 0):
            raise ConfigError(f"num_prefix_tokens={extra!r} is not a number of tokens. Give an int of 0 or more.")
        if self.r is not None:
            self._check_r()
        if self.method != "merge":
            self._fix_by_publication()

    def _check_r(self) -> None:
        if self.method != "tome":
            raise ConfigError(f"r={self.r!r} is an option of method 'tome'. Give keep_rate for {self.method!r}.")
        if not isinstance(self.r, Integral) or isinstance(self.r, bool) or self.r < 0:
            raise ConfigError(f"r={self.r!r} is not a number of tokens. Give an int of 0 or more, such as 13.")
        if self.keep_rate != 0.7:
            raise ConfigError(
                f"keep_rate={self.keep_rate!r} and r={self.r} say the same thing twice. Give one of them."
            )

    def _fix_by_publication(self) -> None:
        for option in fields(self):
            if option.name in ("importance", "similarity", "multi_scale", "schedule"):
                value = getattr(self, option.name)
                if value != option.default:
                    raise ConfigError(
                        f"{option.name}={value!r} is an option of method 'merge'; {self.method!r} is as it was "
                        f"published. Leave {option.name} out, or choose method='merge'."
                    )
        if self.method not in PROPORTIONAL:
            object.__setattr__(self, "proportional_attention", False)

    @classmethod
    def of(cls, keep_rate: "KeepRate | MergeConfig", **options: object) -> "MergeConfig":
        """Return a config from what `apply` was given: a keep rate or a config, and options that override it."""
        known = [f.name for f in fields(cls) if f.name != "keep_rate"]
        for name in options:
            if name not in known:
                raise ConfigError(f"There is no option {name!r}. The options are {', '.join(known)}.")
        if isinstance(keep_rate, MergeConfig):
            return replace(keep_rate, **options)  # type: ignore[arg-type]
        return cls(keep_rate, **options)  # type: ignore[arg-type]

    def to_json(self) -> str:
        """Return the options that are not the defaults as JSON, for `from_json`."""
        options = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return json.dumps(options)  # the keys of a mapping become strings

    @classmethod
    def from_json(cls, text: str) -> "MergeConfig":
        """Read what `to_json` wrote.

        Raises:
            ConfigError: the text is not that, or an option has a value that is not allowed.
        """
        try:
            options = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f'The options are not JSON such as {{"stages": [2, 5, 8]}}: {error}.') from error
        if not isinstance(options, dict):
            raise ConfigError('The options are not a JSON object such as {"stages": [2, 5, 8]}.')
        rate = options.pop("keep_rate", 0.7)
        if isinstance(rate, dict):
            rate = {int(block) if block.isdecimal() else block: of_block for block, of_block in rate.items()}
        return cls.of(rate, **options)

    def amounts(
        self,
        depth: int,
        default: Sequence[int] | None = None,
        sections: Sequence[range] | None = None,
        by_numbers: bool = True,
    ) -> dict[int, Amount]:
        """Return {block index: amount} for a model of `depth` blocks, without the stages that keep everything.

        Args:
            depth: number of blocks.
            default: the stages of equal rates if none were asked for; None for 1/4, 1/2 and 3/4 of the depth.
            sections: runs of blocks through which tokens may stay fewer; None for one that is all of them.
            by_numbers: small keep rates mean equal numbers if nothing else is asked for; false for equal rates.

        Raises:
            ConfigError: a block index does not exist, or the number of keep rates is not that of the stages.
        """
        default = default_stages(depth) if default is None else default
        sections = [range(depth)] if sections is None else sections
        amounts = self._all_amounts(default, sections, by_numbers)
        for index in amounts:
            if index >= depth:
                raise ConfigError(f"Block {index} does not exist: the model has {depth} blocks, 0 to {depth - 1}.")
        keeps_all = (1.0, 0)
        return {
            index: amount for index, amount in sorted(amounts.items()) if amount != keeps_all[isinstance(amount, int)]
        }

    def _all_amounts(self, default: Sequence[int], sections: Sequence[range], by_numbers: bool) -> Mapping[int, Amount]:
        stages = self.stages
        if isinstance(self.keep_rate, Mapping):
            return self.keep_rate
        if self.r is not None:
            every = [block for section in sections for block in section]
            return dict.fromkeys(every if stages is None else stages, self.r)
        if isinstance(self.keep_rate, tuple):
            stages = default if stages is None else stages
            if len(self.keep_rate) != len(stages):
                raise ConfigError(_wrong_number(self.keep_rate, stages))
            return dict(zip(stages, self.keep_rate, strict=True))
        assert isinstance(self.keep_rate, float)
        every_block = self.method in EVERY_BLOCK and stages is None
        # Learned fusion stays in front of the same stage while keep rates change in training.
        small = self.keep_rate < 1 - LARGEST_CUT and self.multi_scale != "learned"
        numbers = self.schedule == "equal_numbers" or (
            self.schedule is None and by_numbers and stages is None and small
        )
        if not every_block and (not numbers or self.method != "merge"):
            return dict.fromkeys(default if stages is None else stages, self.keep_rate)
        amounts: dict[int, Amount] = {}
        for section in sections:
            inside = {block - section.start: self.keep_rate for block in default if block in section}
            if every_block:
                weights = late_weights(len(section)) if self.method == "late_tome" else [1.0] * len(section)
                rates = [max(0.5, rate) for rate in spread(inside, weights, least=0.5)]
            else:
                own = numbered_stages(len(section)) if stages is None else [block - section.start for block in stages]
                weights = [float(block in own) for block in range(len(section))]
                if stages is None and len(own) > 1:
                    weights[own[0]] = FIRST_STAGE
                rates = spread(inside, weights, least=1 - LARGEST_CUT)
            amounts.update(zip(section, rates, strict=True))
        outside = [block for block in stages or () if not any(block in section for section in sections)]
        return amounts | dict.fromkeys(outside, self.keep_rate)  # to be refused by name


def default_stages(depth: int) -> tuple[int, ...]:
    """Return the blocks at 1/4, 1/2 and 3/4 of the depth, as in the paper: 3, 6 and 9 of 12."""
    return at_twelfths(depth, (3, 6, 9))


def at_twelfths(depth: int, twelfths: Sequence[int]) -> tuple[int, ...]:
    """Return the blocks at so many twelfths of the depth, in their order, each of them once."""
    return tuple(sorted({depth * twelfth // 12 for twelfth in twelfths}))


def numbered_stages(depth: int) -> tuple[int, ...]:
    """Return the stages of equal numbers: the blocks at 1, 3, 5 and 7 twelfths of the depth, and of 12.

    A fifth one, at 9, takes its time for choosing, and at equal multiply-adds the error is no less with it
    (examples/results/dense.md). Not the last block, in which only the MLP would be left to gain, unless there is no
    other.
    """
    return tuple(block for block in at_twelfths(depth, (1, 3, 5, 7)) if block < depth - 1) or (0,)


def late_weights(depth: int) -> list[float]:
    """Return weights of the blocks for `spread` that grow with the square of the depth (LaterIsBetter)."""
    return [((block + 1) / depth) ** 2 for block in range(depth)]


def spread(schedule: Mapping[int, float], weights: Sequence[float], least: float) -> list[float]:
    """Return one keep rate for each block that together leave as much work as a schedule of stages.

    A block then merges a number of tokens in proportion to its weight, but keeps at least the share `least` of those
    that it has; where that leaves too much work, blocks keep one share, a smaller one.

    Args:
        schedule: {block index: keep rate}.
        weights: one for each block, not negative; 0 for a block that merges nothing.
        least: in (0, 1).
    """
    target = _work([schedule.get(block, 1.0) for block in range(len(weights))])

    def rates(strength: float) -> list[float]:
        if strength <= 1:  # of what makes every block keep `least`
            return rates_of_numbers(strength / smallest, weights, least)
        return rates_of_numbers(math.inf, weights, least / strength)

    smallest = min(weight for weight in weights if weight)
    low, high = 0.0, 100.0
    for _ in range(64):
        middle = (low + high) / 2
        if _work(rates(middle)) > target:
            low = middle
        else:
            high = middle
    return rates(low)


def rates_of_numbers(merged: float, weights: Sequence[float], least: float) -> list[float]:
    """Return keep rates of blocks that merge `merged` times their weights of the first block's tokens.

    A block keeps at least the share `least` of those that it has; one of weight 0 keeps all.
    """
    rates, share = [], 1.0
    for weight in weights:
        rates.append(max(least, 1 - merged * weight / share) if weight else 1.0)
        share *= rates[-1]
    return rates


def _work(rates: Sequence[float]) -> float:
    """Return the work that keep rates leave of blocks with 1 each.

    It is counted as linear in the tokens, a third of it in the attention, whose block reduces them behind it.
    """
    work, share = 0.0, 1.0
    for rate in rates:
        work += share / 3
        share *= rate
        work += share * 2 / 3
    return work


def tokens_kept(tokens: int, amount: Amount) -> int:
    """Return how many of the tokens stay: ceil(amount * tokens), at least 1; or all but `amount`, at least half."""
    if isinstance(amount, int):
        return tokens - min(amount, tokens // 2)
    # In integers, so that the number of tokens may be a symbol, and 0.55 * 100 is not a little more than 55.
    share, whole = ratio(amount)
    return (share * tokens + whole - 1) // whole  # of positive numbers: ONNX would round others towards 0


def ratio(rate: float) -> tuple[int, int]:
    """Return the fraction that a positive rate was meant to be, such as (3, 5) for 0.6.

    It is the last convergent of its continued fraction whose denominator does not exceed 10^9: closer to the rate than
    floats are to each other, or the rate itself.
    """
    numerator, denominator = rate.as_integer_ratio()
    before, last = (0, 1), (1, 0)
    while denominator:
        whole = numerator // denominator
        following = (whole * last[0] + before[0], whole * last[1] + before[1])
        if following[1] > 10**9:
            break
        before, last = last, following
        numerator, denominator = denominator, numerator - whole * denominator
    return last if last[0] else (1, 10**9)


def _checked_keep_rate(keep_rate: object) -> float | tuple[float, ...] | dict[int, float]:
    if isinstance(keep_rate, Mapping):
        indices = _checked_stages(tuple(keep_rate), "keep_rate")
        return {i: _checked_rate(rate) for i, rate in zip(indices, keep_rate.values(), strict=True)}
    if isinstance(keep_rate, Sequence) and not isinstance(keep_rate, str | bytes):
        return tuple(_checked_rate(rate) for rate in keep_rate)
    return _checked_rate(keep_rate)


def _checked_rate(rate: object) -> float:
    if not isinstance(rate, Real) or isinstance(rate, bool):
        raise ConfigError(
            f"keep_rate={rate!r} is a {type(rate).__name__}. Give a number in (0, 1], a sequence of them (one a stage) "
            "or a mapping {block index: number}."
        )
    if not 0 < float(rate) <= 1:  # also catches NaN
        raise ConfigError(f"keep_rate={rate!r} is outside (0, 1]. 1.0 keeps every token, 0.7 is a good start.")
    return float(rate)


def _checked_stages(stages: object, option: str = "stages") -> tuple[int, ...]:
    if not isinstance(stages, Sequence) or isinstance(stages, str | bytes):
        raise ConfigError(f"{option}={stages!r} is not a sequence of block indices, such as (3, 6, 9).")
    for index in stages:
        if not isinstance(index, Integral) or isinstance(index, bool) or index < 0:
            raise ConfigError(f"{option}: {index!r} is not a block index. Count blocks from 0.")
    if len(set(stages)) != len(stages):
        raise ConfigError(f"{option}={tuple(stages)} names a block twice.")
    return tuple(int(index) for index in stages)


def _wrong_number(rates: Sequence[float], stages: Sequence[int]) -> str:
    return (
        f"keep_rate has {len(rates)} numbers for {len(stages)} stages, at blocks {tuple(stages)}. "
        "Give one number a stage, or choose the blocks with stages=..."
    )
