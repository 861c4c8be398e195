"""What the user may ask for: `MergeConfig`, its validation, and the way from keep rates to token counts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from typing import TypeAlias

from token_merge_plugin.errors import ConfigError

KeepRate: TypeAlias = float | Sequence[float] | Mapping[int, float]
# What a stage does: the share of its tokens that stays (a float), or the number of tokens that go (an int).
Amount: TypeAlias = float | int

METHODS = ("merge", "tome", "late_tome", "evit", "ppt", "prune", "random")
# Of these: reduce tokens a little in every block; choose by the class token's attention; may drop tokens for good;
# may attend in proportion to the tokens' sizes.
EVERY_BLOCK = ("tome", "late_tome")
BY_CLASS_ATTENTION = ("evit", "ppt", "prune")
DROPPING = ("ppt", "prune", "random")
PROPORTIONAL = ("merge", "tome", "late_tome", "ppt")
IMPORTANCE = ("auto", "class_attention", "uniform")
SIMILARITY = ("tokens", "keys", "values")
MULTI_SCALE = ("off", "importance", "descriptors", "learned")


@dataclass(frozen=True)
class MergeConfig:
    """Options of `apply`; everything but `keep_rate` has a measured default.

    Attributes:
        keep_rate: share of the image tokens that each stage keeps, in (0, 1]: one float for every stage, a sequence
            with one float a stage, or a mapping {block index: rate}, which also says where the stages are. For
            "tome" and "late_tome", which reduce tokens a little in every block, one float asks for the compute that
            it would leave with three stages.
        method: "merge" is this package's own. The others are published baselines to compare it with, whose further
            options are fixed: "tome" (Bolya et al. 2023), "late_tome" (as "tome", with numbers of merged tokens that
            grow with the square of the depth: LaterIsBetter), "evit" (Liang et al. 2022), "ppt" (Wu et al. 2023:
            image by image, drops tokens or merges them), "prune" (as "evit", but the tokens that do not stay are
            dropped) and "random" (as "prune", in a pseudo-random order of the patches).
        r: of "tome" only, and instead of keep_rate: how many tokens each block merges, at most half of them.
        stages: indices of the blocks that reduce tokens, counted through the whole network; None for the family's
            measured default: blocks at 1/4, 1/2 and 3/4 of the depth where tokens leave the sequence for good.
        importance: whose attention says how much an image token matters. "auto": that of 16 image tokens, evenly
            spaced, which stand for all; where tokens are merged before they attend, nobody's. "class_attention": that
            of the class token (and of DeiT's distillation token). "uniform": nobody's, distinctiveness alone decides.
        distinctiveness: weigh the importance of a token by how little it resembles the tokens that stay.
        similarity: descriptors that decide which crucial token takes a merged one: "tokens" (as they leave the
            attention's residual), "keys" or "values".
        multi_scale: where features of several scales of the patch grid are fused in: "off", "importance" or
            "descriptors", where they help to choose tokens, which stay as they are; or "learned", into the tokens in
            front of the first stage, by depthwise convolutions whose gates start at zero: to be trained. Their
            parameters join the model's `state_dict`, with "token_merge_fusion" in their names.
        proportional_attention: attend to a merged token as often as to the patches it stands for (ToMe, Bolya et
            al. 2023, section 3). Of "merge", "tome", "late_tome" and "ppt"; always off in the others.

    Raises:
        ConfigError: an option has a value that is not allowed.
    """

    keep_rate: KeepRate = field(default=0.7, hash=False)
    method: str = "merge"
    r: int | None = None
    stages: Sequence[int] | None = None
    importance: str = "auto"
    distinctiveness: bool = True
    similarity: str = "tokens"
    multi_scale: str = "off"
    proportional_attention: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_rate", _checked_keep_rate(self.keep_rate))
        if self.stages is not None:
            object.__setattr__(self, "stages", _checked_stages(self.stages))
        if isinstance(self.keep_rate, Mapping) and self.stages is not None:
            raise ConfigError("keep_rate is a mapping, which already names the blocks: leave stages out.")
        if isinstance(self.keep_rate, tuple) and self.stages and len(self.keep_rate) != len(self.stages):
            raise ConfigError(_wrong_number(self.keep_rate, self.stages))
        for name, allowed in (
            ("method", METHODS),
            ("importance", IMPORTANCE),
            ("similarity", SIMILARITY),
            ("multi_scale", MULTI_SCALE),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name}={value!r} is not known. Choose one of {', '.join(map(repr, allowed))}.")
        for name in ("distinctiveness", "proportional_attention"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name}={getattr(self, name)!r} is not a bool. Give True or False.")
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
            if option.name in ("importance", "distinctiveness", "similarity", "multi_scale"):
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
        if isinstance(self.keep_rate, Mapping):  # JSON's keys are strings
            options |= {"keep_rate": list(self.keep_rate.values()), "stages": list(self.keep_rate)}
        return json.dumps(options)

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
        return cls.of(options.pop("keep_rate", 0.7), **options)

    def schedule(
        self, depth: int, default: Sequence[int] | None = None, sections: Sequence[range] | None = None
    ) -> dict[int, Amount]:
        """Return {block index: amount} for a model of `depth` blocks, without the stages that keep everything.

        Args:
            depth: number of blocks.
            default: the stages if none were asked for; None for 1/4, 1/2 and 3/4 of the depth.
            sections: runs of blocks through which tokens may stay fewer; None for one that is all of them.

        Raises:
            ConfigError: a block index does not exist, or the number of keep rates is not that of the stages.
        """
        default = default_stages(depth) if default is None else default
        sections = [range(depth)] if sections is None else sections
        amounts: dict[int, Amount]
        if isinstance(self.keep_rate, Mapping):
            amounts = dict(self.keep_rate)
        elif self.r is not None:
            every = [block for section in sections for block in section]
            amounts = dict.fromkeys(every if self.stages is None else self.stages, self.r)
        elif self.method in EVERY_BLOCK and self.stages is None and isinstance(self.keep_rate, float):
            amounts = {}
            for section in sections:
                inside = [block - section.start for block in default if block in section]
                weights = late_weights(len(section)) if self.method == "late_tome" else [1.0] * len(section)
                rates = spread(dict.fromkeys(inside, self.keep_rate), weights)
                amounts.update(zip(section, rates, strict=True))
        else:
            stages = default if self.stages is None else self.stages
            if isinstance(self.keep_rate, tuple):
                if len(self.keep_rate) != len(stages):
                    raise ConfigError(_wrong_number(self.keep_rate, stages))
                amounts = dict(zip(stages, self.keep_rate, strict=True))
            else:
                amounts = dict.fromkeys(stages, self.keep_rate)  # type: ignore[arg-type]
        for index in amounts:
            if index >= depth:
                raise ConfigError(f"Block {index} does not exist: the model has {depth} blocks, 0 to {depth - 1}.")
        keeps_all = (1.0, 0)
        return {
            index: amount for index, amount in sorted(amounts.items()) if amount != keeps_all[isinstance(amount, int)]
        }


def default_stages(depth: int) -> tuple[int, ...]:
    """Return the blocks at 1/4, 1/2 and 3/4 of the depth, as in the paper: 3, 6 and 9 of 12."""
    return tuple(sorted({depth * quarter // 4 for quarter in (1, 2, 3)}))


def late_weights(depth: int) -> list[float]:
    """Return weights of the blocks for `spread` that grow with the square of the depth (LaterIsBetter)."""
    return [((block + 1) / depth) ** 2 for block in range(depth)]


def spread(schedule: Mapping[int, float], weights: Sequence[float]) -> list[float]:
    """Return one keep rate for each block that together leave as much work as a schedule of stages.

    Every block then merges a number of tokens in proportion to its weight, but at most half of those that it has: with
    equal weights always the same number, as in ToMe.

    Args:
        schedule: {block index: keep rate}.
        weights: positive, one for each block.
    """
    target = _work([schedule.get(block, 1.0) for block in range(len(weights))])
    # Work falls with the share of the tokens that weight 1 merges; the higher one makes every block merge half.
    low, high = 0.0, 1 / min(weights)
    for _ in range(64):
        middle = (low + high) / 2
        if _work(_rates(middle, weights)) > target:
            low = middle
        else:
            high = middle
    return _rates(low, weights)


def _rates(merged: float, weights: Sequence[float]) -> list[float]:
    """Return keep rates of blocks that merge `merged` times their weights of the first block's tokens, or half."""
    rates, share = [], 1.0
    for weight in weights:
        rates.append(max(0.5, 1 - merged * weight / share))
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
