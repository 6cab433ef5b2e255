"""The bundled quantizer: ggml's own code, from the PyPI package ``libggml-python``.

Only ``libggml-base`` is loaded. It holds the reference quantizers that llama-quantize runs as well,
so the bytes are the same; the compute backends beside it need instructions that not every processor
has, and are never touched.
"""

import ctypes
import functools
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from quantplan.errors import QuantizeError
from quantplan.qtypes import QType
from quantplan.quantize.backend import Bytes, Floats

_FOLDERS = ("lib64", "lib", "bin")
_FILE_NAMES = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}
_INSTEAD = (
    "Install it with: pip install 'libggml-python>=0.20,<0.21'. Where it has no wheel, use "
    "--backend llama-quantize."
)

# name: (result, arguments), as ggml.h of ggml 0.20 declares them
_FUNCTIONS = {
    "ggml_version": (ctypes.c_char_p, []),
    "ggml_type_name": (ctypes.c_char_p, [ctypes.c_int]),
    "ggml_row_size": (ctypes.c_size_t, [ctypes.c_int, ctypes.c_int64]),
    "ggml_validate_row_data": (ctypes.c_bool, [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]),
    "ggml_quantize_init": (None, [ctypes.c_int]),
    "ggml_quantize_requires_imatrix": (ctypes.c_bool, [ctypes.c_int]),
    "ggml_quantize_chunk": (
        ctypes.c_size_t,
        [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p],
    ),
    "ggml_get_type_traits": (ctypes.c_void_p, [ctypes.c_int]),
}


class _TypeTraits(ctypes.Structure):
    """The head of ``ggml_type_traits``, up to the dequantizer."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("block_interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
    )


_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class Ggml:
    """ggml's quantizers. Safe to share between threads: every call runs without the GIL.

    Attributes:
        path: File that was loaded.
        version: Version that the library states.
        name: The library with its version.
    """

    def __init__(self, path: Path) -> None:
        """Loads the library; `ggml` does it once per process.

        Args:
            path: File of ``libggml-base``.

        Raises:
            QuantizeError: The file cannot be loaded or lacks a function.
        """
        self.path = path
        try:
            self._library = ctypes.CDLL(str(path))
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(self._library, name)
                function.restype, function.argtypes = result, arguments
        except (OSError, AttributeError) as error:
            hint = " On Windows it needs the Visual C++ redistributable." * (
                sys.platform == "win32"
            )
            raise QuantizeError(f"{path} cannot be used: {error}.{hint} {_INSTEAD}") from error
        self.version: str = self._library.ggml_version().decode()
        self.name = f"ggml {self.version}"
        self._dequantizer = functools.cache(self._find_dequantizer)
        self._ready: set[str] = set()
        self._lock = threading.Lock()

    def prepare(self, qtype: QType, *, has_imatrix: bool = False) -> None:
        """Checks that the library knows a type as quantplan does, and builds its tables.

        Takes effect once per type; call it before threads start to use the type.

        Args:
            qtype: The type.
            has_imatrix: Whether every use of it comes with an importance matrix.

        Raises:
            QuantizeError: The library does not know the type, its rows have another size, or the
                type needs an importance matrix.
        """
        with self._lock:
            is_ready = qtype.name in self._ready
            if not is_ready:
                self._check(qtype)
            if not has_imatrix:
                self._check_imatrix(qtype)
            if not is_ready:
                self._library.ggml_quantize_init(qtype.ggml_id)
                self._ready.add(qtype.name)

    def _check(self, qtype: QType) -> None:
        # The library reads past its table when asked for the name of a number beyond it;
        # validating no bytes tells whether a number is in the table.
        known = self._library.ggml_validate_row_data(qtype.ggml_id, None, 0)
        name = self._library.ggml_type_name(qtype.ggml_id).decode() if known else "unknown"
        if name.upper() != qtype.name:
            raise QuantizeError(
                f"type {qtype.ggml_id} is {qtype.name}, but {name} to ggml {self.version}, which "
                f"does not fit this quantplan. {_INSTEAD}"
            )
        n_columns = 8 * qtype.block
        row_bytes = self._library.ggml_row_size(qtype.ggml_id, n_columns)
        if row_bytes != qtype.row_bytes(n_columns):
            raise QuantizeError(
                f"a row of {n_columns} weights takes {qtype.row_bytes(n_columns)} bytes as "
                f"{qtype.name}, but {row_bytes} bytes in ggml {self.version}, which does not fit "
                f"this quantplan. {_INSTEAD}"
            )

    def _check_imatrix(self, qtype: QType) -> None:
        if qtype.needs_imatrix or self._library.ggml_quantize_requires_imatrix(qtype.ggml_id):
            raise QuantizeError(
                f"{qtype.name} needs an importance matrix, but there is none for it; give one, "
                "or choose another type"
            )

    def to_float32(self, qtype: QType, raw: Bytes, floats: Floats) -> Floats:
        """Converts stored weights, floating-point numbers exactly; see `Backend.to_float32`.

        Returns:
            A view of ``raw`` for F32, of ``floats`` otherwise.
        """
        if qtype.name == "F32":
            return raw.view(np.float32)
        n_weights = raw.size // qtype.block_bytes * qtype.block
        self._dequantizer(qtype.ggml_id)(raw.ctypes.data, floats.ctypes.data, n_weights)
        return floats[:n_weights]

    def _find_dequantizer(self, ggml_id: int) -> Callable[[int, int, int], None]:
        address = self._library.ggml_get_type_traits(ggml_id)
        return _TO_FLOAT(_TypeTraits.from_address(address).to_float)

    def round_trip(self, qtype: QType, rows: Floats, importance: Floats | None = None) -> Floats:
        """What is left of rows that are quantized and read back.

        Args:
            qtype: A quantized type that `prepare` accepted.
            rows: As `Backend.quantize` takes them.
            importance: Weight of each column, or None.

        Returns:
            Rows of the same shape.
        """
        stored = np.empty(rows.shape[0] * qtype.row_bytes(rows.shape[1]), dtype=np.uint8)
        self.quantize(qtype, rows, stored, importance)
        restored = np.empty(rows.size, dtype=np.float32)
        return self.to_float32(qtype, stored, restored).reshape(rows.shape)

    def quantize(
        self, qtype: QType, rows: Floats, out: Bytes, importance: Floats | None = None
    ) -> bool:
        """Quantizes whole rows with ggml's reference code; see `Backend.quantize`.

        Raises:
            QuantizeError: The library wrote another number of bytes than the rows take.
        """
        weights = None if importance is None else importance.ctypes.data
        n_bytes = self._library.ggml_quantize_chunk(
            qtype.ggml_id, rows.ctypes.data, out.ctypes.data, 0, *rows.shape, weights
        )
        if n_bytes != out.nbytes:
            raise QuantizeError(
                f"ggml {self.version} wrote {n_bytes} bytes of {qtype.name} instead of "
                f"{out.nbytes}, so it does not fit this quantplan. {_INSTEAD}"
            )
        return bool(
            self._library.ggml_validate_row_data(qtype.ggml_id, out.ctypes.data, out.nbytes)
        )


@functools.cache
def ggml() -> Ggml:
    """The bundled library, loaded at first use.

    Raises:
        QuantizeError: ``libggml-python`` is not installed or cannot be loaded.
    """
    name = _FILE_NAMES.get(sys.platform, "libggml-base.so")
    spec = find_spec("libggml")
    for package in (spec.submodule_search_locations or ()) if spec else ():
        for folder in _FOLDERS:
            path = Path(package, folder, name)
            if path.is_file():
                return Ggml(path)
    raise QuantizeError(f"ggml's library {name} is not installed. {_INSTEAD}")
