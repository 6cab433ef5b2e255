"""The base of every value that travels between the stages and can be saved as JSON."""

from pydantic import BaseModel, ConfigDict, ValidationError


class Frozen(BaseModel):
    """An immutable value that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


def faults_of(error: ValidationError) -> list[str]:
    """What is wrong with a document, where the document itself would be too long to show.

    Returns:
        One text for each fault: the fields that lead to it, if any, and what is wrong there.
    """
    return [
        ": ".join(filter(None, (".".join(map(str, fault["loc"])), fault["msg"])))
        for fault in error.errors(include_url=False, include_input=False)
    ]
