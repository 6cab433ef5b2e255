"""What llama.cpp accepts, apart from the models that check it: help pages load nothing else."""

from typing import Literal

KVType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]
"""KV cache types that llama.cpp accepts for ``-ctk`` and ``-ctv`` (b11434)."""

AnyKVType = Literal[KVType, "q6_0"]
"""Those, and one that only ik_llama.cpp has."""

FLASH_BY_DEFAULT = frozenset({"f32", "f16", "bf16", "q8_0", "q4_0"})
"""Types, of K and V alike, that CUDA and ROCm builds attend to (ggml/src/ggml-cuda/fattn.cu)."""

FLASH_IF_BUILT = FLASH_BY_DEFAULT | {"q4_1", "q5_0", "q5_1"}
"""Those, in any pairs, that they attend to where built with ``GGML_CUDA_FA_ALL_QUANTS``."""

Vendor = Literal["nvidia", "amd", "intel", "apple"]
"""Whose a GPU is."""

BACKENDS: dict[Vendor, str] = {"nvidia": "CUDA", "amd": "ROCm", "intel": "SYCL", "apple": "MTL"}
"""What ``-ot`` calls the GPUs of a vendor, numbered from 0, in builds for that vendor."""

COMMON_BACKEND = "Vulkan"
"""What builds call GPUs that use them whatever their vendor."""

GPU_BUFFERS = "|".join((*BACKENDS.values(), COMMON_BACKEND, "CANN", "MUSA", "OpenCL"))
"""A regular expression for what builds call the GPUs of this host, without the number."""

OLDEST_KNOWN_BUILD = 10434
"""The oldest llama.cpp build whose behaviour was checked."""

NEWEST_KNOWN_BUILD = 11434
"""The newest llama.cpp build whose behaviour was checked."""
