"""What a quantizer has to offer, and a slow one in numpy to check others with."""

from typing import Protocol

import gguf
import numpy as np
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from quantplan.errors import QuantizeError
from quantplan.qtypes import QType

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]


class Backend(Protocol):
    """Converts rows of weights; several threads call it at once.

    Attributes:
        name: What it is and its version, as the written file states it.
    """

    @property
    def name(self) -> str:
        """What it is and its version."""
        ...

    def prepare(self, qtype: QType, *, has_imatrix: bool = False) -> None:
        """Gets ready for a type; called once per type before threads start to use it.

        Args:
            qtype: The type.
            has_imatrix: Whether every use of it comes with an importance matrix.

        Raises:
            QuantizeError: The backend cannot write the type.
        """
        ...

    def to_float32(self, qtype: QType, raw: Bytes, floats: Floats) -> Floats:
        """Converts stored weights to single precision.

        Args:
            qtype: Type that they are stored in.
            raw: Contiguous bytes of whole blocks.
            floats: Contiguous memory that the result may use, at least as long as it.

        Returns:
            One number per weight.
        """
        ...

    def quantize(
        self, qtype: QType, rows: Floats, out: Bytes, importance: Floats | None = None
    ) -> bool:
        """Quantizes whole rows; floating-point types are rounded.

        Args:
            qtype: A type that `prepare` accepted.
            rows: Contiguous, shape (rows, columns), finite, and their magnitudes below about 1e9:
                ggml ends the process on some others.
            out: Contiguous memory of exactly the rows' bytes.
            importance: Weight of each column, at least 0, as an importance matrix has it.

        Returns:
            Whether the result is valid; False where a number or the scale of a block overflowed.

        Raises:
            QuantizeError: The backend contradicts what is known of the type.
        """
        ...


class NumpyBackend:
    """The gguf package's own quantizers of the simple types: slow, and independent of ggml."""

    name = f"gguf {gguf.GGUF_VERSION}"
    qtypes = frozenset(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16", "F32"))
    _without_imatrix = frozenset(("Q8_0", "BF16", "F16", "F32"))  # no use for one

    def prepare(self, qtype: QType, *, has_imatrix: bool = False) -> None:
        """Refuses types that the gguf package cannot write as llama.cpp does."""
        if qtype.name not in self.qtypes:
            raise QuantizeError(
                f"the numpy backend cannot write {qtype.name}, only "
                f"{', '.join(sorted(self.qtypes))}; use the default backend"
            )
        if has_imatrix and qtype.name not in self._without_imatrix:
            raise QuantizeError(
                f"the numpy backend cannot use an importance matrix for {qtype.name}; use the "
                "default backend"
            )

    def to_float32(self, qtype: QType, raw: Bytes, floats: Floats) -> Floats:  # noqa: ARG002
        """Converts stored weights to single precision, in memory of its own."""
        if qtype.name == "F32":
            return raw.view(np.float32)
        if qtype.name == "F16":
            return raw.view(np.float16).astype(np.float32)
        found = dequantize(raw.reshape(1, -1), gguf.GGMLQuantizationType[qtype.name])
        return np.ascontiguousarray(found.reshape(-1), dtype=np.float32)

    def quantize(
        self, qtype: QType, rows: Floats, out: Bytes, importance: Floats | None = None
    ) -> bool:
        """Quantizes whole rows."""
        self.prepare(qtype, has_imatrix=importance is not None)
        with np.errstate(over="ignore", invalid="ignore"):
            stored = quantize(rows, gguf.GGMLQuantizationType[qtype.name])
            out[:] = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)
            return bool(np.isfinite(self.to_float32(qtype, out, rows)).all())
