"""The base class of a recipe's sections, and the types that their fields share."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from longrope2_ray.storage.urls import refuse_credentials

AttentionFactor = float | Literal["su", "yarn", "search"]
Positive = Annotated[int, Field(ge=1)]
Location = Annotated[str, Field(min_length=1), AfterValidator(refuse_credentials)]


class Section(BaseModel):
    """A section of a recipe: unknown fields are refused, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
