"""Which models are alike: by who trained them, by the design of their architecture, by size."""

import re

from quantplan.inventory import Inventory

# general.architecture of models that share their design with another one's.
_LINEAGES = ("qwen35", "qwen3", "deepseek", "glm4")


def family(architecture: str) -> str:
    """The family of an architecture: dense, sparse and vision models of one design are together."""
    return next((stem for stem in _LINEAGES if architecture.startswith(stem)), architecture)


def maker(inventory: Inventory) -> str:
    """Who trained a model, as its vocabulary tells: makers keep theirs from design to design.

    The letters that ``tokenizer.ggml.pre`` begins with (``qwen`` of ``qwen35``), or those of the
    architecture where the vocabulary has no name.
    """
    name = str(inventory.metadata.get("tokenizer.ggml.pre") or inventory.architecture.name)
    found = re.match("[a-z]+", name.lower())
    return found.group() if found else name


def shape(inventory: Inventory) -> str:
    """The design and its size: models that differ in training alone have the same."""
    found = inventory.architecture
    return f"{found.name} {found.n_loaded_layers}x{found.n_embd}x{found.n_expert}"


def groups(inventory: Inventory) -> dict[str, str]:
    """What a model has in common with others, from the widest group to the narrowest."""
    return {
        "maker": maker(inventory),
        "family": family(inventory.architecture.name),
        "shape": shape(inventory),
    }
