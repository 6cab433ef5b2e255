"""The bundled ggml library, compared with the numpy quantizers of the gguf package."""

import sys
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from quantplan.errors import QuantizeError
from quantplan.qtypes import QTYPES
from quantplan.quantize.ggml import Ggml, ggml

N_COLUMNS = 768
N_ROWS = 33
NUMPY_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "BF16", "F16", "TQ1_0", "TQ2_0", "MXFP4")


def quantized(name: str, rows: np.ndarray) -> np.ndarray:
    """Quantizes rows with the library."""
    qtype, library = QTYPES[name], ggml()
    library.prepare(qtype)
    out = np.empty(qtype.tensor_bytes(rows.shape[::-1]), np.uint8)
    assert library.quantize(qtype, rows, out)
    return out.reshape(len(rows), -1)


@pytest.mark.parametrize("name", NUMPY_TYPES)
def test_blocks_agree_with_numpy(name: str) -> None:
    """Types that the gguf package quantizes in numpy have the same bytes from the library."""
    rows = np.random.default_rng(0).standard_normal((N_ROWS, N_COLUMNS), dtype=np.float32)
    expected = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[name])
    assert np.array_equal(quantized(name, rows), expected.view(np.uint8))


@pytest.mark.parametrize(
    "name",
    [
        t.name
        for t in QTYPES.values()
        if t.is_file_target and "llama.cpp" in t.runtimes and not t.needs_imatrix
    ],
)
def test_every_type_comes_close_to_the_weights(name: str) -> None:
    """Each type that llama.cpp writes without an importance matrix is known and approximates."""
    rows = np.random.default_rng(1).standard_normal((4, 512), dtype=np.float32)
    data = quantized(name, rows)
    if name in {"NVFP4", "Q1_0", "Q2_0"}:  # gguf cannot dequantize all of them
        return
    restored = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    correlation = np.corrcoef(restored.ravel(), rows.ravel())[0, 1]
    assert correlation > (0.7 if name.startswith("TQ") else 0.95)  # three values per weight


@pytest.mark.parametrize("name", ["F16", "BF16", "F32"])
def test_stored_numbers_convert_exactly(name: str) -> None:
    """Every finite number of a source type becomes the very same single-precision number."""
    qtype = QTYPES[name]
    bits = np.arange(1 << 16, dtype=np.uint16)
    expected = (bits.astype(np.uint32) << 16).view(np.float32)
    if name == "F16":
        expected = bits.view(np.float16).astype(np.float32)
    raw = expected.view(np.uint8) if name == "F32" else bits.view(np.uint8)
    converted = ggml().to_float32(qtype, raw, np.empty(bits.size, np.float32))
    finite = np.isfinite(expected)
    assert np.array_equal(converted[finite].view(np.uint32), expected[finite].view(np.uint32))
    assert not np.isfinite(converted[~finite]).any()


@pytest.mark.parametrize("name", [t.name for t in QTYPES.values() if t.needs_imatrix])
def test_types_that_need_an_imatrix_are_refused(name: str) -> None:
    """A type that ggml cannot quantize without an importance matrix is refused, not tried."""
    with pytest.raises(QuantizeError, match=f"{name} needs an importance matrix"):
        ggml().prepare(QTYPES[name])


def test_a_type_of_another_size_is_refused() -> None:
    """A library whose blocks have another size than quantplan expects is refused."""
    odd = replace(QTYPES["Q4_K"], block_bytes=145)
    library = Ggml(ggml().path)
    with pytest.raises(QuantizeError, match="takes 1160 bytes as Q4_K, but 1152 bytes in ggml"):
        library.prepare(odd)


@pytest.mark.parametrize("number", [12, 133])
def test_a_number_of_another_type_is_refused(number: int) -> None:
    """A type number that means another type to the library, or none, is refused."""
    odd = replace(QTYPES["IQ4_KS"], ggml_id=number)
    with pytest.raises(QuantizeError, match=f"type {number} is IQ4_KS, but "):
        ggml().prepare(odd)


def test_an_overflow_is_reported() -> None:
    """Scales beyond half precision make an invalid block, and the caller is told."""
    qtype, library = QTYPES["Q8_0"], ggml()
    library.prepare(qtype)
    rows = np.full(32, 1e8, np.float32)
    assert not library.quantize(qtype, rows.reshape(-1, 32), np.empty(34, np.uint8))


def test_an_unusable_library_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    """A file that is no library, or another one, says what to install."""
    junk = tmp_path / "libggml-base.so"
    junk.write_bytes(b"not a library")
    with pytest.raises(QuantizeError, match=r"cannot be used: .*pip install 'libggml-python"):
        Ggml(junk)


def test_a_missing_library_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without libggml-python the error says what to install."""
    monkeypatch.setattr(sys.modules[Ggml.__module__], "find_spec", lambda _: None)
    with pytest.raises(QuantizeError, match=r"is not installed.*pip install 'libggml-python"):
        ggml.__wrapped__()
