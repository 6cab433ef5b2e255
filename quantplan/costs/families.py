"""Which models are alike: by who trained them, by the design of their architecture, by shape."""

import hashlib
import re

from quantplan.inventory import Inventory, Tensor

# general.architecture of models that share their design with another one's.
_LINEAGES = ("qwen35", "qwen3", "deepseek", "glm4")


def family(architecture: str) -> str:
    """The family of an architecture: dense, sparse and vision models of one design are together."""
    return next((stem for stem in _LINEAGES if architecture.startswith(stem)), architecture)


def maker(inventory: Inventory) -> str:
    """Who trained a model, as its vocabulary tells: makers keep theirs from design to design.

    The letters that ``tokenizer.ggml.pre`` begins with (``qwen`` of ``qwen35``), or those of the
    architecture where the vocabulary has none, or ``default``, which names nobody.
    """
    name = str(inventory.metadata.get("tokenizer.ggml.pre") or "default")
    if name == "default":
        name = inventory.architecture.name
    found = re.match("[a-z]+", name.lower())
    return found.group() if found else name


def quantized(inventory: Inventory) -> list[Tensor]:
    """Tensors that a quantizer may change and that the runtime loads."""
    return [t for t in inventory.tensors if t.is_quantizable and inventory.is_loaded(t)]


def shape(inventory: Inventory) -> str:
    """What models have in common whose layers have the same tensors of the same shapes.

    Such models differ in training alone. Embeddings do not count: finetunes add tokens.
    """
    shapes = sorted(f"{t.name} {t.shape_ne}" for t in quantized(inventory) if t.layer is not None)
    return hashlib.sha256("\n".join(shapes).encode()).hexdigest()[:12]


def groups(inventory: Inventory) -> dict[str, str]:
    """What a model has in common with others, from the widest group to the narrowest."""
    return {
        "maker": maker(inventory),
        "family": family(inventory.architecture.name),
        "shape": shape(inventory),
    }
