"""The number of the recipe's fields is frozen."""

from longrope2_ray.recipe.fields import field_names
from longrope2_ray.recipe.recipe import Recipe

# data.sources.* and data.bands.* count once each, sections do not count.
NUM_FIELDS = 95


def test_a_new_field_earns_its_place() -> None:
    names = set(field_names(Recipe))
    sections = {name.rpartition(".")[0] for name in names}
    assert len(names - sections) == NUM_FIELDS, (
        "A new field earns its place by a measurement in jobs/LOG.md of what it gains. "
        "Add the measurement and change NUM_FIELDS; a field that gains nothing is deleted, "
        "and its measurement stays in the log."
    )
