"""What people ask of a model first: how large it is, and how much of it each token reads."""

from quantplan.inventory import Inventory
from quantplan.schema import Frozen


class ModelSummary(Frozen):
    """A model in a line.

    Attributes:
        name: What to call it.
        architecture: llama.cpp's name of the architecture.
        n_params: Weights of the whole file.
        n_active_params: Weights that a token goes through: of the experts those that are used, the
            embedding whole, no next-token-prediction blocks.
        n_layers: Layers, without next-token-prediction blocks.
    """

    name: str
    architecture: str
    n_params: int
    n_active_params: int
    n_layers: int


def summarize(inventory: Inventory) -> ModelSummary:
    """Sums a model up.

    Raises:
        UnsupportedModelError: The metadata lack what the architecture needs.
    """
    architecture = inventory.architecture
    loaded = [t for t in inventory.tensors if inventory.is_loaded(t)]
    experts = sum(t.n_weights for t in loaded if t.is_expert)
    others = sum(t.n_weights for t in loaded) - experts
    return ModelSummary(
        name=inventory.name,
        architecture=architecture.name,
        n_params=inventory.n_weights,
        n_active_params=others + round(experts * architecture.active_share),
        n_layers=architecture.n_loaded_layers,
    )
