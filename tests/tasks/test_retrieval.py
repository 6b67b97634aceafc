import hashlib
import itertools
import json
import random
import re

from longrope2_ray.data.documents import find_files, read_documents
from longrope2_ray.recipe.training import SourceSection
from longrope2_ray.tasks.needle import INSTRUCTION, NEEDLE
from longrope2_ray.tasks.retrieval import (
    RETRIEVAL,
    retrieval_document,
    retrieval_documents,
    seen_in_training,
)

QUESTION = re.compile(r"What is the special magic number for (\S+) mentioned .* text is (\d+)$")
NEEDLES = re.compile(
    re.escape(NEEDLE).replace(r"\{key\}", r"(\S+)").replace(r"\{value\}", r"(\d+)")
)


def test_a_document_holds_the_answer_to_its_question_and_only_keys_to_train_on() -> None:
    rng = random.Random(0)
    counts = set()
    for document in (retrieval_document(rng, ["x" * 500, "y" * 500], 300) for _ in range(50)):
        key, value = QUESTION.search(document).groups()
        needles = NEEDLES.findall(document)
        assert (key, value) in needles
        assert all(seen_in_training(k) for k, _ in needles)
        body = NEEDLES.sub("", document.removeprefix(INSTRUCTION)).split("\nWhat is")[0]
        assert body in ("x" * 300, "y" * 300)
        counts.add(len(needles))
    assert counts == {1, 2, 3}


def test_trained_models_depend_on_these_very_documents() -> None:
    lines = "".join(json.dumps({"text": text}) + "\n" for text in retrieval_documents())
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == "6a3a8bf474eb9218"


def test_a_source_reads_them_by_name() -> None:
    source = SourceSection(name="s", path=[RETRIEVAL])
    assert find_files(source) == [(RETRIEVAL, 0)]
    read = itertools.islice(read_documents(source, RETRIEVAL), 5)
    assert list(read) == list(itertools.islice(retrieval_documents(), 5))
