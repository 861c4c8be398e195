"""The registry: which `Adapter` serves which class of models."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from torch import nn

if TYPE_CHECKING:
    from token_merge_plugin.adapters.base import Adapter

_registry: dict[type[nn.Module], "Adapter"] = {}

# {module of timm: why the family that it defines is not served}.
missing: dict[str, str] = {}

AdapterClass = TypeVar("AdapterClass", bound="type[Adapter]")


def register_adapter(*model_classes: type[nn.Module]) -> Callable[[AdapterClass], AdapterClass]:
    """Class decorator: serve these model classes, and their subclasses, with the decorated `Adapter`.

    The nearest registered class in the order of inheritance decides, so a subclass can have its own adapter. A
    later registration of the same class replaces the earlier one.

    Example:
        >>> @register_adapter(MyVisionTransformer)
        ... class MyAdapter(VisionTransformerAdapter):
        ...     family = "mine"
    """

    def register(adapter: AdapterClass) -> AdapterClass:
        _registry.update(dict.fromkeys(model_classes, adapter()))
        return adapter

    return register


def find_adapter(model: nn.Module) -> "Adapter | None":
    """Return the adapter of the model's class, or None."""
    for cls in type(model).__mro__:
        if cls in _registry:
            return _registry[cls]
    return None


def registered_adapters() -> list["Adapter"]:
    """Return every adapter, in the order of registration."""
    return list(dict.fromkeys(_registry.values()))
