"""Tensor types of llama.cpp and ik_llama.cpp: exact bytes, fallbacks, imatrix needs.

Block sizes of the mainline types come from the ``gguf`` package. What that package lacks is listed
here: ``Q2_0`` (llama.cpp b11434, ggml 0.26) and the types of ik_llama.cpp (its gguf-py constants
for ids and blocks; its source for the bytes that precede every row).
"""

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import gguf

Runtime = Literal["llama.cpp", "ik_llama.cpp"]

_NOT_FILE_TARGETS = {"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"}
_MAINLINE_ONLY = {"NVFP4", "Q2_0", "TQ1_0", "TQ2_0"}
# llama-quantize refuses these without an importance matrix.
_NEEDS_IMATRIX = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"}
# llama-quantize's substitutes where a row is not a multiple of the block.
_FALLBACK = {
    **dict.fromkeys(
        ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"], "IQ4_NL"
    ),
    **dict.fromkeys(["Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"], "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
# ik_llama.cpp where it differs.
_IK_FALLBACK = {
    **dict.fromkeys(["Q5_K", "IQ5_K"], "Q6_0"),
    **dict.fromkeys(["Q2_K", "Q3_K", "IQ2_K", "IQ2_KS", "IQ2_KL", "IQ3_K", "IQ3_KS"], "IQ4_NL"),
    **dict.fromkeys(["IQ4_KSS", "IQ4_KS"], "IQ4_NL"),
    **dict.fromkeys(["Q4_K", "IQ4_K", "IQ5_KS"], "Q5_0"),
    **dict.fromkeys(["Q6_K", "IQ6_K"], "Q8_0"),
}
# name: (ggml id, block, bytes per block, bytes before each row)
_IK_ONLY = {
    "Q6_0": (133, 32, 26, 0),
    "IQ1_BN": (134, 64, 13, 2),
    "IQ2_BN": (135, 64, 16, 4),
    "IQ2_K": (137, 256, 76, 0),
    "IQ3_K": (138, 256, 110, 0),
    "IQ4_K": (139, 256, 144, 0),
    "IQ5_K": (140, 256, 176, 0),
    "IQ6_K": (141, 256, 212, 0),
    "IQ4_KS": (144, 256, 136, 4),
    "IQ2_KS": (145, 256, 70, 2),
    "IQ4_KSS": (146, 256, 128, 4),
    "Q8_KV": (151, 32, 32, 8),
    "IQ5_KS": (152, 256, 168, 4),
    "IQ2_KT": (153, 256, 68, 4),
    "IQ3_KT": (154, 256, 100, 4),
    "IQ4_KT": (155, 256, 128, 4),
    "IQ3_KS": (156, 256, 102, 2),
    "IQ2_KL": (157, 256, 86, 2),
    "IQ1_KT": (158, 256, 56, 4),
    "Q4_0_R8": (202, 32, 18, 0),
    "Q5_0_R4": (206, 32, 22, 0),
    "Q8_0_R8": (208, 32, 34, 0),
    "Q2_K_R4": (210, 256, 84, 0),
    "Q3_K_R4": (211, 256, 110, 0),
    "Q4_K_R4": (212, 256, 144, 0),
    "Q5_K_R4": (213, 256, 176, 0),
    "Q6_K_R4": (214, 256, 210, 0),
    "IQ2_XXS_R4": (216, 256, 66, 0),
    "IQ2_XS_R4": (217, 256, 74, 0),
    "IQ3_XXS_R4": (218, 256, 98, 0),
    "IQ1_S_R4": (219, 32, 6, 2),
    "IQ4_NL_R4": (220, 32, 18, 0),
    "IQ3_S_R4": (221, 256, 110, 0),
    "IQ2_S_R4": (222, 256, 82, 0),
    "IQ4_XS_R8": (223, 256, 136, 0),
    "IQ1_M_R4": (229, 32, 7, 2),
    "BF16_R16": (230, 1, 2, 0),
    "Q6_0_R4": (233, 32, 26, 0),
    "IQ2_BN_R4": (335, 64, 16, 4),
    "IQ2_K_R4": (337, 256, 76, 0),
    "IQ3_K_R4": (338, 256, 110, 0),
    "IQ4_K_R4": (339, 256, 144, 0),
    "IQ5_K_R4": (340, 256, 176, 0),
    "IQ4_KS_R4": (344, 256, 136, 4),
    "IQ5_KS_R4": (352, 256, 168, 4),
    "Q8_KV_R8": (398, 32, 32, 4),
    "Q8_K_R8": (399, 256, 258, 0),
}


@dataclass(frozen=True, slots=True)
class QType:
    """One tensor type.

    Attributes:
        name: Upper-case ggml name, such as ``Q4_K``.
        ggml_id: Number of the type in GGUF files.
        block: Weights per block; a row must hold a whole number of blocks.
        block_bytes: Bytes per block.
        row_meta_bytes: Bytes that precede each row, beside its blocks (some ik_llama.cpp types).
        runtimes: Runtimes that load the type.
        needs_imatrix: llama-quantize refuses the type without an importance matrix.
        is_file_target: A quantizer may write the type for a weight matrix.
    """

    name: str
    ggml_id: int
    block: int
    block_bytes: int
    row_meta_bytes: int
    runtimes: frozenset[Runtime]
    needs_imatrix: bool
    is_file_target: bool

    @property
    def bpw(self) -> float:
        """Bits per weight, without the bytes that precede each row."""
        return self.block_bytes * 8 / self.block

    @property
    def is_float(self) -> bool:
        """Whether the type stores plain floating-point numbers that a quantizer can start from."""
        return self.name in {"F32", "F16", "BF16"}

    def row_fault(self, n_columns: int) -> str | None:
        """Why a row cannot have the type; None where it can.

        Args:
            n_columns: Weights per row (``ne0``).
        """
        if n_columns % self.block == 0:
            return None
        return (
            f"rows of {n_columns} weights are no whole number of blocks of {self.name} "
            f"({self.block} weights)"
        )

    def row_bytes(self, n_columns: int) -> int:
        """Exact bytes of one row.

        Args:
            n_columns: Weights per row (``ne0``).

        Raises:
            ValueError: The row is not a whole number of blocks.
        """
        if fault := self.row_fault(n_columns):
            raise ValueError(fault)
        return self.row_meta_bytes + n_columns // self.block * self.block_bytes

    def tensor_bytes(self, shape_ne: tuple[int, ...]) -> int:
        """Exact bytes of a tensor.

        Args:
            shape_ne: Shape in GGUF order, row length first.

        Raises:
            ValueError: The row is not a whole number of blocks.
        """
        return math.prod(shape_ne[1:]) * self.row_bytes(shape_ne[0])


def _table() -> dict[str, QType]:
    mainline = {t.name: (int(t), *gguf.GGML_QUANT_SIZES[t], 0) for t in gguf.GGMLQuantizationType}
    mainline.setdefault("Q2_0", (42, 64, 18, 0))
    # ggml's Q8_1 block holds a half-precision scale and sum; the gguf package states 40 bytes.
    mainline["Q8_1"] = (9, 32, 36, 0)
    everywhere: frozenset[Runtime] = frozenset(("llama.cpp", "ik_llama.cpp"))
    types = {}
    for name, (ggml_id, block, block_bytes, row_meta) in {**mainline, **_IK_ONLY}.items():
        if name in _IK_ONLY:
            runtimes: frozenset[Runtime] = frozenset(("ik_llama.cpp",))
        else:
            runtimes = frozenset(("llama.cpp",)) if name in _MAINLINE_ONLY else everywhere
        types[name] = QType(
            name=name,
            ggml_id=ggml_id,
            block=block,
            block_bytes=block_bytes,
            row_meta_bytes=row_meta,
            runtimes=runtimes,
            needs_imatrix=name in _NEEDS_IMATRIX,
            is_file_target=name not in _NOT_FILE_TARGETS,
        )
    return types


QTYPES = MappingProxyType(_table())
"""Every known tensor type by upper-case name."""

_BY_ID = MappingProxyType({t.ggml_id: t for t in QTYPES.values()})


def qtype(name: str) -> QType:
    """Looks a type up by name, in any case.

    Raises:
        KeyError: No runtime has such a type.
    """
    return QTYPES[name.upper()]


def qtype_by_id(ggml_id: int) -> QType | None:
    """The type with a GGUF file's type number, or None where no runtime is known to have it."""
    return _BY_ID.get(ggml_id)


def fitting_qtype(name: str, n_columns: int, runtime: Runtime = "llama.cpp") -> QType | None:
    """The type that a quantizer really writes when asked for ``name``.

    llama-quantize replaces a type whose block does not divide the row, and falls back to F16 where
    the replacement does not divide it either.

    Args:
        name: Wanted type.
        n_columns: Weights per row (``ne0``).
        runtime: Whose fallback table applies.

    Returns:
        The type written, or None where the quantizer stops with an error because it has no
        substitute (NVFP4, Q1_0, and the types with a block of 32 themselves).
    """
    wanted = qtype(name)
    if n_columns % wanted.block == 0:
        return wanted
    table = _FALLBACK if runtime == "llama.cpp" else {**_FALLBACK, **_IK_FALLBACK}
    substitute = table.get(wanted.name)
    if substitute is None:
        return None
    fallback = QTYPES[substitute]
    return fallback if n_columns % fallback.block == 0 else QTYPES["F16"]
