"""The tensor inventory of a model: what there is to place and to quantize."""

import math
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from pydantic import field_validator

from quantplan.display import Table, html_card, html_table
from quantplan.inventory.architecture import Architecture, read_architecture
from quantplan.inventory.caches import LayerCache
from quantplan.inventory.roles import (
    EXPERT_CLASSES,
    RoleClass,
    is_quantizable,
    role_class,
    split_name,
)
from quantplan.qtypes import qtype
from quantplan.schema import Frozen
from quantplan.units import gib

__all__ = ["Architecture", "Inventory", "LayerCache", "RoleClass", "Tensor"]


class Tensor(Frozen):
    """One tensor of a model.

    Attributes:
        name: Full name, such as ``blk.3.ffn_down_exps.weight``.
        shape_ne: Shape in GGUF order, row length first; experts are the third axis.
        qtype: Type that the tensor has in the source.
    """

    name: str
    shape_ne: tuple[int, ...]
    qtype: str

    @cached_property
    def n_weights(self) -> int:
        """Number of weights."""
        return math.prod(self.shape_ne)

    @cached_property
    def _name_parts(self) -> tuple[int | None, str]:
        return split_name(self.name)

    @property
    def layer(self) -> int | None:
        """llama.cpp's block index; None outside the layers."""
        return self._name_parts[0]

    @property
    def role(self) -> str:
        """Name without layer and ``.weight``, such as ``ffn_down_exps``."""
        return self._name_parts[1]

    @cached_property
    def role_class(self) -> RoleClass:
        """Class of the role, which policies and cost models speak of."""
        return role_class(self.role)

    @property
    def is_expert(self) -> bool:
        """Whether only some of the tensor's matrices are read per token."""
        return self.role_class in EXPERT_CLASSES

    @cached_property
    def is_quantizable(self) -> bool:
        """Whether a quantizer may change the type."""
        return is_quantizable(self.name, self.shape_ne)

    @property
    def n_bytes(self) -> int:
        """Exact bytes at the type it has in the source.

        Raises:
            KeyError: There is no such type.
        """
        return self.bytes_as(self.qtype)

    def bytes_as(self, qtype_name: str) -> int:
        """Exact bytes at another type.

        Args:
            qtype_name: Upper-case name of the type, such as ``Q4_K``.

        Raises:
            KeyError: There is no such type.
            ValueError: The rows are not a whole number of the type's blocks.
        """
        return qtype(qtype_name).tensor_bytes(self.shape_ne)


class Inventory(Frozen):
    """The tensors and the metadata of one model; never its weights.

    Attributes:
        name: What to call the model.
        source: Where it was read from: a path or a catalog name.
        header_sha256: Hash of the header (of all shards' headers, in order), or of the catalog
            entry; it identifies what a plan was made for.
        metadata: GGUF key-value pairs without the long arrays of the vocabulary.
        array_lengths: Lengths of the arrays left out, by key.
        tensors: Every tensor, in file order.
    """

    name: str
    source: str
    header_sha256: str
    metadata: dict[str, Any]
    array_lengths: dict[str, int]
    tensors: tuple[Tensor, ...]

    @field_validator("metadata")
    @classmethod
    def _arrays_are_tuples(cls, metadata: dict[str, Any]) -> dict[str, Any]:
        """Makes an inventory that was loaded from JSON equal to the one that was saved."""
        return {k: tuple(v) if isinstance(v, list) else v for k, v in metadata.items()}

    @cached_property
    def architecture(self) -> Architecture:
        """Dimensions derived from the metadata.

        Raises:
            UnsupportedModelError: A key that the memory of the model depends on is missing, or its
                recurrent state is not modelled.
        """
        return read_architecture(self.metadata)

    @cached_property
    def by_name(self) -> dict[str, Tensor]:
        """Tensors by full name."""
        return {t.name: t for t in self.tensors}

    @property
    def n_weights(self) -> int:
        """Number of weights of the whole file."""
        return sum(t.n_weights for t in self.tensors)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors in the source, without header and padding."""
        return sum(t.n_bytes for t in self.tensors)

    @cached_property
    def n_vocab(self) -> int:
        """Rows of the embedding matrix."""
        embedding = self.by_name.get("token_embd.weight")
        return embedding.shape_ne[1] if embedding else 0

    @property
    def is_for_ik_only(self) -> bool:
        """Whether only ik_llama.cpp loads the model.

        llama.cpp b10434 knows no such architecture, or counts too many tensors.
        """
        has_both = {"attn_kv_b", "attn_k_b"} <= {t.role for t in self.tensors}
        return has_both or self.metadata.get("general.architecture") == "bitnet-25"

    @property
    def has_tied_output(self) -> bool:
        """Whether the output matrix is the embedding matrix."""
        return "output.weight" not in self.by_name

    def with_qtypes(self, qtypes: Mapping[str, str]) -> "Inventory":
        """The inventory of the file in which some tensors have other types.

        Args:
            qtypes: New types by full tensor name; the other tensors keep theirs.
        """
        tensors = tuple(
            Tensor(name=t.name, shape_ne=t.shape_ne, qtype=qtypes.get(t.name, t.qtype))
            for t in self.tensors
        )
        return Inventory(
            name=self.name,
            source=self.source,
            header_sha256=self.header_sha256,
            metadata=self.metadata,
            array_lengths=self.array_lengths,
            tensors=tensors,
        )

    def is_loaded(self, tensor: Tensor) -> bool:
        """Whether llama.cpp loads the tensor for plain decoding.

        Next-token-prediction blocks (the last ``nextn_predict_layers`` ones) are skipped unless
        multi-token prediction is asked for.

        Args:
            tensor: One of this model.

        Raises:
            UnsupportedModelError: The metadata do not say how many layers there are.
        """
        arch = self.architecture
        return tensor.layer is None or tensor.layer < arch.n_loaded_layers

    def to_frame(self) -> Any:
        """The tensors as a pandas data frame (or polars where only that is installed).

        Raises:
            MissingPackageError: Neither is installed.
        """
        return Table(
            self.name,
            {
                "tensor": [t.name for t in self.tensors],
                "layer": [t.layer for t in self.tensors],
                "role": [t.role for t in self.tensors],
                "role_class": [t.role_class for t in self.tensors],
                "shape_ne": [list(t.shape_ne) for t in self.tensors],
                "qtype": [t.qtype for t in self.tensors],
                "n_weights": [t.n_weights for t in self.tensors],
                "n_bytes": [t.n_bytes for t in self.tensors],
            },
        ).to_frame()

    def _repr_html_(self) -> str:
        found = Counter((t.role, t.shape_ne, t.qtype) for t in self.tensors)
        sizes = {key: n * math.prod(key[1]) for key, n in found.items()}
        rows = [
            (role, found[role, shape, kind], "x".join(map(str, shape)), kind, size / 1e9)
            for (role, shape, kind), size in sorted(sizes.items(), key=lambda item: -item[1])
        ]
        facts = {
            "source": self.source,
            "size": f"{self.n_weights / 1e9:.2f}e9 weights, {gib(self.n_bytes)}",
        }
        header = ("role", "tensors", "shape_ne", "qtype", "weights (1e9)")
        return html_card(self.name, facts, html_table("Tensors by role", header, rows))
