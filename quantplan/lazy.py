"""Names of a package that are imported when they are first asked for.

All of quantplan takes half a second to import. A help page, the shell's completion, and a program
that only reads a recipe should not wait for the solver.
"""

import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType


class LazyPackage(ModuleType):
    """A package that takes its names from its modules when they are first asked for.

    Python binds a module to its package once it is imported. Several of quantplan's functions are
    named like their modules (`quantplan.predict`), and such a name must stay the function's,
    whoever imports the module and when.
    """

    _homes: Mapping[str, str]

    def __getattr__(self, name: str) -> object:
        """What a module defines under a name, or the module of that name."""
        if name.startswith("_"):  # tools ask any object for names such as `_repr_html_`
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if name in self._homes:
            value = getattr(import_module(f"{self.__name__}.{self._homes[name]}"), name)
            setattr(self, name, value)
            return value
        module = f"{self.__name__}.{name}"
        try:
            return import_module(module)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}") from None

    def __setattr__(self, name: str, value: object) -> None:
        """Binds a name, unless a module would take the name of one of the package's functions."""
        if not (isinstance(value, ModuleType) and name in self._homes):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        """All names, imported or not."""
        return sorted({*super().__dir__(), *self._homes})


def bind(package: str, names: Mapping[str, Sequence[str]]) -> None:
    """Makes a package import names when they are first asked for.

    Args:
        package: Its name; it is being imported.
        names: Names by the module, seen from the package, that defines them.
    """
    module = sys.modules[package]
    module.__class__ = LazyPackage
    module.__dict__["_homes"] = {name: home for home, own in names.items() for name in own}
