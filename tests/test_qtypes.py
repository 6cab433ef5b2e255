"""Types: exact bytes, substitutes, importance matrices, runtimes."""

import ctypes
import math

import gguf
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quant_shape_to_byte_shape
from hypothesis import given, settings
from hypothesis import strategies as st

from quantplan.inventory import Tensor
from quantplan.qtypes import QTYPES, QType, fitting_qtype, qtype, qtype_by_id
from quantplan.quantize.ggml import ggml

# Weights per block, bytes per block and bits per weight, as llama.cpp's documentation states them.
MAINLINE = {
    "Q1_0": (128, 18, 1.125),
    "IQ1_S": (256, 50, 1.5625),
    "TQ1_0": (256, 54, 1.6875),
    "IQ1_M": (256, 56, 1.75),
    "IQ2_XXS": (256, 66, 2.0625),
    "TQ2_0": (256, 66, 2.0625),
    "Q2_0": (64, 18, 2.25),
    "IQ2_XS": (256, 74, 2.3125),
    "IQ2_S": (256, 82, 2.5625),
    "Q2_K": (256, 84, 2.625),
    "IQ3_XXS": (256, 98, 3.0625),
    "Q3_K": (256, 110, 3.4375),
    "IQ3_S": (256, 110, 3.4375),
    "IQ4_XS": (256, 136, 4.25),
    "MXFP4": (32, 17, 4.25),
    "Q4_K": (256, 144, 4.5),
    "Q4_0": (32, 18, 4.5),
    "IQ4_NL": (32, 18, 4.5),
    "NVFP4": (64, 36, 4.5),
    "Q4_1": (32, 20, 5.0),
    "Q5_0": (32, 22, 5.5),
    "Q5_K": (256, 176, 5.5),
    "Q5_1": (32, 24, 6.0),
    "Q6_K": (256, 210, 6.5625),
    "Q8_0": (32, 34, 8.5),
    "F16": (1, 2, 16.0),
    "BF16": (1, 2, 16.0),
    "F32": (1, 4, 32.0),
}
INTERNAL = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}
# Weights per block, bytes per block, bits per weight and bytes before each row.
IK = {
    "IQ1_BN": (64, 13, 1.625, 2),
    "IQ2_BN": (64, 16, 2.0, 4),
    "IQ1_S_R4": (32, 6, 1.5, 2),
    "IQ1_M_R4": (32, 7, 1.75, 2),
    "IQ1_KT": (256, 56, 1.75, 4),
    "IQ2_KT": (256, 68, 2.125, 4),
    "IQ3_KT": (256, 100, 3.125, 4),
    "IQ4_KT": (256, 128, 4.0, 4),
    "IQ2_KS": (256, 70, 2.1875, 2),
    "IQ2_KL": (256, 86, 2.6875, 2),
    "IQ3_KS": (256, 102, 3.1875, 2),
    "IQ4_KSS": (256, 128, 4.0, 4),
    "IQ4_KS": (256, 136, 4.25, 4),
    "IQ5_KS": (256, 168, 5.25, 4),
    "IQ2_K": (256, 76, 2.375, 0),
    "IQ3_K": (256, 110, 3.4375, 0),
    "IQ4_K": (256, 144, 4.5, 0),
    "IQ5_K": (256, 176, 5.5, 0),
    "IQ6_K": (256, 212, 6.625, 0),
    "Q6_0": (32, 26, 6.5, 0),
    "Q8_KV": (32, 32, 8.0, 8),
    "Q8_KV_R8": (32, 32, 8.0, 4),
    "Q8_K_R8": (256, 258, 8.0625, 0),
}
NEED_IMATRIX = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"}
# What llama-quantize writes instead where 256 (64 for Q2_0) does not divide the row but 32 does.
SUBSTITUTES = {
    **dict.fromkeys(NEED_IMATRIX | {"IQ3_S", "IQ4_XS"}, "IQ4_NL"),
    **dict.fromkeys({"Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"}, "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
IK_SUBSTITUTES = {
    **dict.fromkeys({"Q5_K", "IQ5_K"}, "Q6_0"),
    **dict.fromkeys({"Q2_K", "Q3_K", "IQ2_K", "IQ2_KS", "IQ3_K", "IQ3_KS", "IQ4_KS"}, "IQ4_NL"),
    **dict.fromkeys({"Q4_K", "IQ4_K", "IQ5_KS"}, "Q5_0"),
}
FILE_TARGETS = sorted(MAINLINE)
mainline_types = pytest.mark.parametrize("name", FILE_TARGETS)


@mainline_types
def test_mainline_blocks_are_llama_cpps(name: str) -> None:
    """Each type has the block, the bytes and the bits per weight that llama.cpp gives it."""
    kind = QTYPES[name]
    assert (kind.block, kind.block_bytes, kind.bpw) == MAINLINE[name]
    assert kind.row_meta_bytes == 0
    assert kind.is_file_target


@pytest.mark.parametrize("name", sorted(IK))
def test_ik_blocks_are_ik_llama_cpps(name: str) -> None:
    """Each type of ik_llama.cpp has its block, and the bytes that precede every row."""
    kind = QTYPES[name]
    assert (kind.block, kind.block_bytes, kind.bpw, kind.row_meta_bytes) == IK[name]
    assert kind.runtimes == {"ik_llama.cpp"}


def test_repacked_types_take_the_bytes_of_their_base() -> None:
    """Interleaved types take the bytes of the type that they interleave, one-bit types excepted."""
    repacked = {
        n: n.rpartition("_R")[0] for n in QTYPES if "_R" in n and not n.startswith(("IQ1_", "Q8_K"))
    }
    assert len(repacked) > 20
    for name, base in repacked.items():
        assert QTYPES[name].row_bytes(1024) == QTYPES[base].row_bytes(1024)


def test_mainline_types_are_all_known() -> None:
    """Every type is a file target or internal, for llama.cpp exactly those of its own table."""
    mainline = {name for name, kind in QTYPES.items() if "llama.cpp" in kind.runtimes}
    assert mainline == set(MAINLINE) | INTERNAL
    assert {name for name in mainline if not QTYPES[name].is_file_target} == INTERNAL


@pytest.mark.parametrize("name", [t.name for t in GGMLQuantizationType if t.name != "Q8_1"])
@pytest.mark.parametrize("shape_ne", [(1024,), (256, 3), (512, 5, 7), (256, 2, 3, 2)])
def test_tensor_bytes_equal_the_gguf_package(name: str, shape_ne: tuple[int, ...]) -> None:
    """A tensor takes exactly the bytes that the gguf package computes for its shape."""
    kind = GGMLQuantizationType[name]
    n_items = math.prod(quant_shape_to_byte_shape(shape_ne[::-1], kind))
    assert QTYPES[name].tensor_bytes(shape_ne) == n_items
    assert Tensor(name="a", shape_ne=shape_ne, qtype="F32").bytes_as(name) == n_items


@given(st.sampled_from(sorted(set(MAINLINE) | INTERNAL)), st.integers(1, 400))
@settings(deadline=None)
def test_row_bytes_equal_ggml(name: str, n_blocks: int) -> None:
    """A row takes exactly the bytes that ggml's own library computes."""
    library = ctypes.CDLL(str(ggml().path))
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_validate_row_data.restype = ctypes.c_bool
    library.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    kind = QTYPES[name]
    # Asked for a number beyond its table, ggml would read past it; validating tells (Q8_1 alone,
    # which no file holds, cannot be validated).
    assert name == "Q8_1" or library.ggml_validate_row_data(kind.ggml_id, None, 0)
    assert library.ggml_type_name(kind.ggml_id).decode().upper() == name
    n_columns = n_blocks * kind.block
    assert kind.row_bytes(n_columns) == library.ggml_row_size(kind.ggml_id, n_columns)


@given(st.sampled_from(sorted(QTYPES)), st.integers(1, 5000))
@settings(deadline=None)
def test_rows_are_whole_blocks_or_refused(name: str, n_columns: int) -> None:
    """A row that is no whole number of blocks is refused, any other has its bytes."""
    kind = QTYPES[name]
    if n_columns % kind.block:
        with pytest.raises(ValueError, match=f"{n_columns} weights .* blocks of {name}"):
            kind.row_bytes(n_columns)
    else:
        bits = 8 * (kind.row_bytes(n_columns) - kind.row_meta_bytes)
        assert bits == n_columns * kind.bpw


@pytest.mark.parametrize("kind", QTYPES.values(), ids=lambda kind: kind.name)
def test_types_are_found_by_name_and_number(kind: QType) -> None:
    """A type is found by its name in any case and by its number, which no other type has."""
    assert qtype(kind.name) is qtype(kind.name.lower()) is qtype(kind.name.title()) is kind
    assert qtype_by_id(kind.ggml_id) is kind


@pytest.mark.parametrize("number", [4, 5, 31, 32, 33, 36, 37, 38, -1, 10**6])
def test_unknown_numbers_have_no_type(number: int) -> None:
    """Numbers that ggml has retired or never gave out have no type."""
    assert qtype_by_id(number) is None


def test_unknown_names_are_key_errors() -> None:
    """A name of no type is a KeyError."""
    with pytest.raises(KeyError):
        qtype("Q9_K")


def test_numbers_are_the_gguf_packages() -> None:
    """Type numbers are those of the gguf package, as far as it knows the types."""
    assert {t.name: int(t) for t in GGMLQuantizationType}.items() <= {
        name: kind.ggml_id for name, kind in QTYPES.items()
    }.items()
    assert set(GGML_QUANT_SIZES) == set(gguf.GGMLQuantizationType)


def test_imatrix_types_are_llama_quantizes() -> None:
    """Exactly those types need an importance matrix that llama-quantize refuses without one."""
    assert {name for name, kind in QTYPES.items() if kind.needs_imatrix} == NEED_IMATRIX


def test_runtimes_share_all_but_four_types() -> None:
    """ik_llama.cpp loads every mainline type except NVFP4, Q2_0 and the two ternary ones."""
    alone = {name for name, kind in QTYPES.items() if kind.runtimes == {"llama.cpp"}}
    assert alone == {"NVFP4", "Q2_0", "TQ1_0", "TQ2_0"}
    assert {n for n in IK if "llama.cpp" in QTYPES[n].runtimes} == set()


def test_float_types_are_three() -> None:
    """A quantizer can start from F32, F16 and BF16, and from nothing else."""
    assert {name for name, kind in QTYPES.items() if kind.is_float} == {"F32", "F16", "BF16"}


@mainline_types
@pytest.mark.parametrize("n_columns", [256, 4096, 7168])
def test_types_that_fit_are_kept(name: str, n_columns: int) -> None:
    """A type whose block divides the row is written as asked for."""
    assert fitting_qtype(name, n_columns) == QTYPES[name]


@pytest.mark.parametrize("name", sorted(SUBSTITUTES))
@pytest.mark.parametrize("n_columns", [32, 352, 1440])
def test_odd_rows_get_llama_quantizes_substitute(name: str, n_columns: int) -> None:
    """A row that 32 divides, but not the block, gets llama-quantize's substitute."""
    assert fitting_qtype(name, n_columns) == QTYPES[SUBSTITUTES[name]]


@pytest.mark.parametrize(("name", "written"), [("Q6_K", "Q8_0"), ("q4_k", "Q5_0")])
def test_glm_air_down_experts(name: str, written: str) -> None:
    """The 1408-wide rows of GLM-4.5-Air become what its public quants show."""
    assert fitting_qtype(name, 1408) == QTYPES[written]


@pytest.mark.parametrize("name", sorted(SUBSTITUTES))
@pytest.mark.parametrize("n_columns", [1, 33, 1000])
def test_rows_that_nothing_fits_become_f16(name: str, n_columns: int) -> None:
    """A row that neither the type nor its substitute divides is written as F16."""
    assert fitting_qtype(name, n_columns) == QTYPES["F16"]


@pytest.mark.parametrize(
    ("name", "n_columns"), [("NVFP4", 96), ("Q1_0", 192), ("Q8_0", 33), ("MXFP4", 48)]
)
def test_types_without_substitute_are_none(name: str, n_columns: int) -> None:
    """Where the quantizer would stop with an error, there is no type to write."""
    assert fitting_qtype(name, n_columns) is None


@pytest.mark.parametrize("name", sorted(IK_SUBSTITUTES))
def test_ik_llama_cpp_has_other_substitutes(name: str) -> None:
    """ik_llama.cpp's quantizer replaces types by its own table."""
    assert fitting_qtype(name, 1408, "ik_llama.cpp") == QTYPES[IK_SUBSTITUTES[name]]


@given(st.sampled_from(FILE_TARGETS), st.integers(1, 20_000))
@settings(deadline=None)
def test_what_is_written_always_fits(name: str, n_columns: int) -> None:
    """Whatever is asked for, the type written holds the row, and llama.cpp loads it."""
    written = fitting_qtype(name, n_columns)
    if written is None:
        assert n_columns % QTYPES[name].block
        assert name not in SUBSTITUTES
    else:
        assert n_columns % written.block == 0
        assert written.is_file_target
        assert "llama.cpp" in written.runtimes
