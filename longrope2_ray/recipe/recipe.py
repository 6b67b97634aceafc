"""The whole recipe."""

from pydantic import Field, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from longrope2_ray.recipe.sections import (
    ModelSection,
    NeedleSection,
    ReportSection,
    ScorerSection,
    SearchSection,
    StorageSection,
)
from longrope2_ray.recipe.training import DataSection, TrainSection


class Recipe(BaseSettings):
    """A whole run. Unknown keys are refused, with the nearest valid one."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, cli_kebab_case=True, cli_avoid_json=False
    )

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="Name of the run and its directory."
    )
    model: ModelSection
    search: SearchSection
    needles: NeedleSection = NeedleSection()
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
        return (
            init_settings,
        )  # a recipe comes from its file and the command line, never from the environment

    @model_validator(mode="after")
    def _check(self) -> "Recipe":
        if shared := sorted(set(self.needles.text) & set(self.report.text)):
            raise ValueError(
                f"report.text: expected other texts than needles.text, so that what is reported is held out, got "
                f"{', '.join(shared)} in both"
            )
        return self
