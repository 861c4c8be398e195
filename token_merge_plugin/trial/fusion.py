"""What a model was fine-tuned with: its learned multi-scale fusion, and the options it was trained for.

A trial unpatches a model and patches it again, and each time `apply` gives it a new, untrained fusion. What was
trained is kept here meanwhile, and put back by `put_back`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from token_merge_plugin.config import MergeConfig
from token_merge_plugin.errors import ConfigError

# In the names of the fusion's parameters; and the key of the options, as JSON, in a checkpoint.
PART = "token_merge_fusion"
CONFIG_KEY = "token_merge"


@dataclass(frozen=True)
class Trained:
    """The fusion's parameters by their names in the model's `state_dict`, and the options that it was trained with."""

    fusion: Mapping[str, Tensor]
    config: MergeConfig | None = None


_trained: WeakKeyDictionary[nn.Module, Trained] = WeakKeyDictionary()


def remember(model: nn.Module, trained: Trained | None = None) -> None:
    """Keep what belongs to a model: what is given, or the fusion that it is patched with now, if it is."""
    if trained is None:
        fusion = fusion_of(model)
        trained = Trained({name: value.detach().clone() for name, value in fusion.items()}) if fusion else None
    if trained is not None:
        _trained[model] = trained


def remembered(model: nn.Module) -> Trained:
    """Return what was kept of a model: no parameters and no config where there is nothing."""
    return _trained.get(model, Trained({}))


def fusion_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters of the fusion that a model is patched with, by their names in its `state_dict`."""
    return {name: value for name, value in model.state_dict().items() if PART in name}


def with_fusion(config: MergeConfig, model: nn.Module) -> MergeConfig:
    """Return the config with the model's trained fusion switched on, where there is one; baselines have none.

    Raises:
        ConfigError: the config asks for a learned fusion, and none was trained; or for another kind than was.
    """
    has_fusion = bool(remembered(model).fusion)
    if config.multi_scale == "learned" and not has_fusion:
        raise ConfigError(
            "multi_scale='learned' has to be trained, and no trained fusion is there: a new one would be measured. "
            "Give a --checkpoint with it, as examples/finetune.py writes it, or leave multi_scale at 'off'."
        )
    if not has_fusion or config.method != "merge":
        return config
    if config.multi_scale not in ("off", "learned"):
        raise ConfigError(f"multi_scale={config.multi_scale!r} does not go with weights whose fusion was learned.")
    return replace(config, multi_scale="learned")


def put_back(model: nn.Module, config: MergeConfig) -> nn.Module:
    """Give a model that was patched by a config its trained fusion back, if the config has a learned one.

    Raises:
        ConfigError: the fusion was trained in front of another block.
    """
    trained = remembered(model).fusion
    if config.multi_scale != "learned" or not trained:
        return model
    places = [{name.partition(f".{PART}")[0] for name in names} for names in (trained, fusion_of(model))]
    if places[1] and places[0] != places[1]:
        before, now = (", ".join(sorted(place)) for place in places)
        raise ConfigError(
            f"The fusion was trained in {before}, in front of the first stage, and this setting has it in {now}. "
            "Choose the same first stage."
        )
    if places[1]:
        model.load_state_dict(trained, strict=False)
    return model
