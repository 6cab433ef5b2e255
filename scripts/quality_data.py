"""Measured losses, with the inventories of their models, to fit the loss model on."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from quantplan.costs.families import family
from quantplan.costs.quality import type_errors
from quantplan.errors import QuantplanError
from quantplan.formats.sensitivity_tables import SensitivityTable, read_sensitivity_table
from quantplan.inventory import Inventory, Tensor
from quantplan.inventory.catalog import read_catalog
from quantplan.qtypes import QTYPES

# Tables of models that nobody else measured: kld-imatrix.csv of `benchmarks/order_matrices.py MODEL
# --imatrix`, and beside it what it was measured with.
OWN_TABLES = Path(__file__).with_name("measured")
FEWEST_UNITS = 20
# Types for BitNet models, useless for others; 8-bit types whose rows share one scale or that
# quantize activations differently.
NO_WEIGHT_TYPES = {"IQ1_BN", "IQ2_BN", "Q8_KV", "Q8_K"}


@dataclass(frozen=True)
class Unit:
    """Tensors that were measured together.

    Attributes:
        tensors: Quantizable, loaded tensors.
        kld_nats: KLD of the whole model, noise floor included.
    """

    tensors: tuple[Tensor, ...]
    kld_nats: float

    @property
    def roles(self) -> str:
        """Its roles, joined."""
        return "+".join(sorted({tensor.role for tensor in self.tensors}))


@dataclass(frozen=True)
class Measured:
    """One model and what was measured of it.

    Attributes:
        inventory: The model.
        table: All measurements.
        qtype: Type of the units.
        units: Measurements at the type that most tensors were measured at; empty where too few.
        curve: KLD of the whole model by type, the baseline and broken types left out.
    """

    inventory: Inventory
    table: SensitivityTable
    qtype: str
    units: tuple[Unit, ...]
    curve: Mapping[str, float]

    @property
    def family(self) -> str:
        """The family that is left out with the model."""
        return family(self.inventory.architecture.name)


def read_model(path: Path, name: str) -> Measured:
    """Reads the table of one model.

    Raises:
        QuantplanError: There is no inventory of the model, or no KLD in the table.
    """
    inventory = read_catalog(name)
    if inventory is None:
        raise QuantplanError("the catalog has no inventory of it")
    table = read_sensitivity_table(path)
    units: dict[str, list[Unit]] = {}
    for single in table.singles:
        known = [inventory.by_name[n] for n in single.tensors if n in inventory.by_name]
        tensors = tuple(t for t in known if t.is_quantizable and inventory.is_loaded(t))
        is_usable = single.qtype in QTYPES and single.qtype not in NO_WEIGHT_TYPES
        if tensors and is_usable and single.kld_nats > 0:
            units.setdefault(single.qtype, []).append(Unit(tensors, single.kld_nats))
    counts = Counter({name: len(found) for name, found in sorted(units.items())})
    chosen = counts.most_common(1)[0][0] if counts else ""
    enough = counts[chosen] >= FEWEST_UNITS
    curve = {
        name: kld
        for name, kld in table.curve.items()
        if kld > 0 and name in QTYPES and name not in NO_WEIGHT_TYPES and not QTYPES[name].is_float
    }
    return Measured(inventory, table, chosen, tuple(units[chosen]) if enough else (), curve)


def tables(directory: Path) -> dict[str, Path]:
    """Every ``MODEL.csv`` or ``MODEL.csv.gz`` of a directory, by model."""
    paths = (*directory.glob("[!_]*.csv"), *directory.glob("[!_]*.csv.gz"))
    return {p.name.removesuffix(".gz").removesuffix(".csv"): p for p in sorted(paths)}


def all_tables(directory: Path) -> dict[str, Path]:
    """Published tables of a directory and our own, which give way where a model has both."""
    return {**tables(OWN_TABLES), **tables(directory)}


def read_models(paths: Mapping[str, Path]) -> tuple[dict[str, Measured], dict[str, str]]:
    """Reads tables, given by model.

    Returns:
        The models by name, and the reason for each table that cannot be used.
    """
    models: dict[str, Measured] = {}
    skipped: dict[str, str] = {}
    for name, path in paths.items():
        try:
            models[name] = read_model(path, name)
        except QuantplanError as error:
            skipped[name] = str(error)
    return models, skipped


def gaussian_errors() -> dict[str, float]:
    """Relative squared error of the types on Gaussian rows, nothing pooled."""
    return type_errors({"type_error": {}})
