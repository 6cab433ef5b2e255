"""Which evidence gave a number of the loss table."""

from quantplan.schema import Frozen


class Estimate(Frozen):
    """One source of evidence about a loss.

    Attributes:
        source: Where it comes from.
        loss_nats: The loss by this source alone.
        ln_sd: Standard deviation of its logarithm.
    """

    source: str
    loss_nats: float
    ln_sd: float


class Explanation(Frozen):
    """Where one entry of the loss table comes from.

    Attributes:
        tensor: Full name.
        qtype: The type.
        loss_nats: Predicted loss, nats per token.
        ln_sd: Standard deviation of its logarithm.
        sensitivity_nats: Loss per unit of relative squared error.
        error: Relative squared error of the type on this tensor.
        share: Share of the model's sensitivity.
        terms: What each feature adds to the logarithm of the prior sensitivity; they sum to it.
        estimates: What each source of evidence says alone; they are combined with weights of one
            over the variance of the logarithm.
    """

    tensor: str
    qtype: str
    loss_nats: float
    ln_sd: float
    sensitivity_nats: float
    error: float
    share: float
    terms: dict[str, float]
    estimates: tuple[Estimate, ...]
