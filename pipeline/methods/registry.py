"""Registry of the methods by the name that a recipe's `method.name` gives."""

from collections.abc import Callable
from typing import TypeVar

from pipeline.methods.method import Method
from pipeline.recipe import Recipe

MethodClass = TypeVar("MethodClass", bound=type[Method])
_METHODS: dict[str, type[Method]] = {}


def register_method(name: str) -> Callable[[MethodClass], MethodClass]:
    """Register the decorated class, whose constructor takes a recipe, as the method `name`.

    Raises:
        ValueError: If the name is taken.
    """

    def register(method_class: MethodClass) -> MethodClass:
        if name in _METHODS:
            raise ValueError(f"method {name}: already registered by {_METHODS[name].__name__}; rename it")
        _METHODS[name] = method_class
        return method_class

    return register


def build_method(recipe: Recipe) -> Method:
    """Build the recipe's method with new float32 weights from torch's default generator.

    Raises:
        ValueError: If no method of that name is registered.
    """
    name = recipe.method.name
    if name not in _METHODS:
        raise ValueError(f"method.name: {name} is not registered; import it in pipeline/methods/__init__.py")
    return _METHODS[name](recipe)
