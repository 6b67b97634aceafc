"""The whole recipe."""

from typing import Annotated

from pydantic import Field, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from longrope2_ray.recipe.identity import SEARCH
from longrope2_ray.recipe.model import ModelSection
from longrope2_ray.recipe.search import SearchSection
from longrope2_ray.recipe.sections import (
    ReportSection,
    ScorerSection,
    SearchNeedleSection,
    StorageSection,
)
from longrope2_ray.recipe.training import DataSection, TrainSection


class Recipe(BaseSettings):
    """The recipe of a whole run; unknown keys are refused, with the nearest valid one."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, cli_kebab_case=True, cli_avoid_json=False
    )

    name: Annotated[str, SEARCH] = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Name of the run and its directory."
    )
    model: ModelSection
    search: SearchSection
    needles: SearchNeedleSection = SearchNeedleSection()
    report: ReportSection = ReportSection()
    scorer: ScorerSection = ScorerSection()
    storage: StorageSection = StorageSection()
    data: DataSection | None = Field(
        None, description="Training data; only data and train need it."
    )
    train: TrainSection = TrainSection()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # A recipe comes from its file and the command line, never from the environment.
        return (init_settings,)

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if shared := sorted(set(self.needles.text) & set(self.report.text)):
            raise ValueError(
                f"report.text: expected other texts than needles.text, so that what is reported is "
                f"held out, got {', '.join(shared)} in both"
            )
        return self
