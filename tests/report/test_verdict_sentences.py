"""The words of the verdict: exactly what the intervals show."""

import pytest

from longrope2_ray.report.verdict_sentences import verdict
from longrope2_ray.search.verdict import BaselineContrast, Contrast, Interval

INTERVALS = {
    "+": Interval(1.2, 1.1, 1.3, 4),
    "=": Interval(0.97, 0.81, 1.15, 4),
    "-": Interval(0.8, 0.7, 0.9, 4),
    "?": Interval(1.2, 1.1, 1.3, 3),
}
DEPTHS = ("0", "0.25", "0.5", "0.75")


def said(depths: tuple[str, ...] = DEPTHS, **methods: str) -> str:
    """The verdict about baselines, each with a sign for all depths and one for every depth."""
    found = []
    for method, signs in methods.items():
        overall, *by_depth = (INTERVALS[sign] for sign in signs)
        contrast = Contrast(overall, dict(zip(depths, by_depth, strict=True)))
        found.append(BaselineContrast(1024, method, 1.0, 1.0, True, contrast))
    return verdict(found)


@pytest.mark.parametrize(
    ("methods", "sentence"),
    [
        ({"pi": "+++++", "yarn": "+++++"}, "Better than every baseline at every depth."),
        (
            {"pi": "+++++", "yarn": "+++=+"},
            "Better than every baseline over all depths. By depth: not shown to differ from YaRN "
            "at depth 0.5 (ratio 0.97, 0.81 to 1.15); otherwise better.",
        ),
        (
            {"pi": "+++++", "llama3": "-+-++", "yarn": "=+==="},
            "Over all depths: better than PI; worse than Llama 3 (ratio 0.8, 0.7 to 0.9); not "
            "shown to differ from YaRN (ratio 0.97, 0.81 to 1.15). By depth: worse than Llama 3 at "
            "depth 0.25 (ratio 0.8, 0.7 to 0.9); not shown to differ from YaRN at depths 0.25, 0.5 "
            "and 0.75; otherwise better.",
        ),
        (
            {"ntk": "=====", "yarn": "====="},
            "Not shown to differ from any baseline over all depths. By depth: not shown to differ "
            "from any baseline at every depth.",
        ),
        (
            {"ntk": "-----", "yarn": "-----"},
            "Worse than every baseline over all depths. By depth: worse than every baseline at "
            "every depth.",
        ),
        (
            {"ntk": "+????", "yarn": "+????"},
            "Better than every baseline over all depths. By depth: too few needles at every depth.",
        ),
        (
            {"ntk": "+++??", "yarn": "+++??"},
            "Better than every baseline over all depths. By depth: too few needles at depths 0.5 "
            "and 0.75; otherwise better.",
        ),
        (
            {"ntk": "+++++", "yarn": "+++?+"},
            "Better than every baseline over all depths. By depth: too few needles against YaRN at "
            "depth 0.5; otherwise better.",
        ),
        (
            {"ntk": "=++++", "yarn": "=++++"},
            "Not shown to differ from any baseline over all depths. By depth: better than every "
            "baseline.",
        ),
        (
            {"ntk": "?????", "yarn": "?????"},
            "Too few needles over all depths. By depth: too few needles at every depth.",
        ),
        (
            {"pi": "-+--+", "ntk": "-+--+", "yarn": "-+-++"},
            "Worse than every baseline over all depths. By depth: worse than PI and NTK at depths "
            "0.25 and 0.5, YaRN at depth 0.25; otherwise better.",
        ),
    ],
)
def test_what_is_said(methods: dict[str, str], sentence: str) -> None:
    assert said(**methods) == sentence


def test_needles_at_one_depth_have_one_sentence() -> None:
    assert said(("0",), pi="++", yarn="++") == "Better than every baseline at depth 0."
    assert said(("0",), pi="++", yarn="==") == (
        "At depth 0: better than PI; not shown to differ from YaRN (ratio 0.97, 0.81 to 1.15)."
    )
