"""What the model is asked to do: context, slots, batch, KV cache types."""

from typing import Any

from pydantic import Field, ValidationError, ValidationInfo, field_validator

from quantplan.errors import WorkloadError
from quantplan.llama_cpp import NEWEST_KNOWN_BUILD, AnyKVType
from quantplan.schema import Frozen, shortened

MAX_CONTEXT = 2**31 - 1
"""llama.cpp counts tokens in 32 bits."""

MAX_SLOTS = 256
"""llama.cpp makes no context for more (``LLAMA_MAX_SEQ`` in its ``src/llama-cparams.h``)."""

_FLOAT_KV = ("f32", "f16", "bf16")


class Workload(Frozen):
    """How llama.cpp will be started, as far as memory and speed depend on it.

    Attributes:
        context: Tokens of context in total (``-c``); all slots share it.
        slots: Requests served at the same time (``-np``), at most 256.
        kv_unified: One KV buffer for all slots (``-kvu``) instead of an equal part for each.
        batch: Logical batch in tokens (``-b``).
        ubatch: Physical batch in tokens (``-ub``).
        kv_type_k: Type of the K cache (``-ctk``).
        kv_type_v: Type of the V cache (``-ctv``).
        flash_attention: ``-fa on`` or ``off``.
        swa_full: Keep sliding-window layers at the full context (``--swa-full``).
        prompt_tokens: New tokens of a typical prompt, for the time that a turn takes.
        answer_tokens: Tokens of a typical answer.
        llama_cpp_build: Build number of the llama.cpp that will run, where builds differ.

    ``kv_type`` may be given instead of both KV types.

    Raises:
        WorkloadError: A value is out of range, the ubatch is larger than the batch, or the V cache
            is quantized without flash attention, which llama.cpp refuses. All faults are gathered.
    """

    context: int = Field(default=4096, ge=1, le=MAX_CONTEXT)
    slots: int = Field(default=1, ge=1, le=MAX_SLOTS)
    kv_unified: bool = True
    batch: int = Field(default=2048, ge=1)
    ubatch: int = Field(default=512, ge=1, validate_default=True)
    kv_type_k: AnyKVType = "f16"
    kv_type_v: AnyKVType = "f16"
    flash_attention: bool = True
    swa_full: bool = False
    prompt_tokens: int = Field(default=2048, ge=0, le=MAX_CONTEXT)
    answer_tokens: int = Field(default=512, ge=0, le=MAX_CONTEXT)
    llama_cpp_build: int = Field(default=NEWEST_KNOWN_BUILD, ge=1)

    def __init__(self, *, kv_type: str | None = None, **values: Any) -> None:
        """Accepts ``kv_type`` for both caches and raises `WorkloadError` with every fault."""
        if kv_type is not None:
            values = {"kv_type_k": kv_type, "kv_type_v": kv_type} | values
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise WorkloadError(_fault(fault) for fault in error.errors()) from error

    @field_validator("flash_attention")
    @classmethod
    def _quantized_v_needs_flash_attention(cls, value: bool, info: ValidationInfo) -> bool:
        kv_type_v = info.data.get("kv_type_v", "f16")
        if kv_type_v not in _FLOAT_KV and not value:
            raise ValueError(
                f"a V cache of type {kv_type_v} needs flash attention: use "
                "flash_attention=True, or f16 for kv_type_v"
            )
        return value

    @field_validator("ubatch")
    @classmethod
    def _ubatch_is_part_of_the_batch(cls, value: int, info: ValidationInfo) -> int:
        batch = info.data.get("batch", value)
        if value > batch:
            raise ValueError(
                f"the ubatch ({value} tokens) must not be larger than the batch "
                f"({batch} tokens): raise the batch too"
            )
        return value

    @property
    def n_streams(self) -> int:
        """KV buffers per layer, one for all slots, or one each."""
        return 1 if self.kv_unified else self.slots

    @property
    def slot_context(self) -> float:
        """The most tokens of a slot, as those that have a cache each share the context out."""
        return self.context / self.n_streams


def _fault(fault: Any) -> str:
    """One validation fault as a sentence."""
    message = fault["msg"].removeprefix("Value error, ")
    return f"workload {fault['loc'][0]}: {message} (got {shortened(repr(fault['input']))})"
