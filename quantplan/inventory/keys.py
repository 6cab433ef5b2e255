"""Looks architecture keys of the metadata up, and says which are missing or impossible."""

from collections.abc import Mapping
from typing import Any

from quantplan.errors import UnsupportedModelError


class Keys:
    """The metadata keys of one architecture (``ARCH.key``).

    Attributes:
        arch: ``general.architecture``.
    """

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        """Keeps the metadata; nothing is checked yet."""
        self.arch = str(metadata.get("general.architecture", ""))
        self._metadata = metadata

    def get(self, key: str, default: Any = None) -> Any:
        """The value of an architecture key, whatever it is."""
        return self._metadata.get(f"{self.arch}.{key}", default)

    def number(self, key: str, default: int = 0) -> int:
        """A count that may be absent."""
        value = self.get(key)
        return default if value is None else self._count(key, value)

    def _count(self, key: str, value: Any) -> int:
        if not isinstance(value, int) or value < 0:
            raise UnsupportedModelError(
                f"{self.arch}.{key} of this model is {value!r}, which is no count"
            )
        return int(value)

    def need(self, key: str) -> int:
        """A count above 0 that must be there."""
        value = self.get(key)
        if not isinstance(value, int) or value <= 0:
            raise UnsupportedModelError(
                f"the metadata of this {self.arch or 'unknown'} model hold no integer "
                f"{self.arch}.{key} (found {value!r}), without which its memory cannot be computed"
            )
        return value

    def per_layer(self, key: str, n_layers: int, default: int) -> tuple[int, ...]:
        """A count for each layer, from an array or one number for all."""
        value = self.get(key, default)
        if not isinstance(value, (tuple, list)):
            return (self._count(key, value),) * n_layers
        if len(value) < n_layers:
            raise UnsupportedModelError(
                f"{self.arch}.{key} has {len(value)} entries for {n_layers} layers"
            )
        return tuple(self._count(key, v) for v in value[:n_layers])
