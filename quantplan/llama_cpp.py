"""What llama.cpp accepts, apart from the models that check it: help pages load nothing else."""

from typing import Literal

KVType = Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1"]
"""KV cache types that llama.cpp accepts for ``-ctk`` and ``-ctv`` (b11434)."""

AnyKVType = Literal[KVType, "q6_0"]
"""Those, and one that only ik_llama.cpp has."""

NEWEST_KNOWN_BUILD = 11434
"""The newest llama.cpp build whose behaviour was checked."""
