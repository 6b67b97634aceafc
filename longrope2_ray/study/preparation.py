"""The preparation of a study: everything that is checked before its first trial starts."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from longrope2_ray.data.plan import prepare_data
from longrope2_ray.search.preparation import Prepared, finished_winner, open_run, prepare
from longrope2_ray.search.scores import report_set
from longrope2_ray.storage.rundir import RunDir
from longrope2_ray.study.spec import Study, Trial
from longrope2_ray.training.records import read_result, training_dir

# In the training's folder: the trained model's scores on the report's needles.
TRAINED_FILE = "needles.json"


@dataclass(frozen=True)
class PreparedTrial:
    """A trial that is checked.

    Attributes:
        trial: the trial.
        prepared: the inputs of its search.
        url: its run directory, as every process of a cluster may use it.
    """

    trial: Trial
    prepared: Prepared
    url: str

    def open(self) -> RunDir:
        """Begin or find the trial's run directory and return it.

        Raises:
            RunDirError: if it holds another run.
        """
        run_dir = RunDir(self.url)
        open_run(self.prepared, run_dir)
        return run_dir

    def has_winner(self) -> bool:
        """Tell whether the search is finished, with the tables that the recipe asks for."""
        return finished_winner(self.prepared, RunDir(self.url)) is not None

    def is_finished(self) -> bool:
        """Tell whether the whole trial is finished.

        Raises:
            RunDirError: if there is a finished training of another recipe.
        """
        return self.has_winner() and (not self.trial.train or self._is_trained())

    def _is_trained(self) -> bool:
        from longrope2_ray.training.job import open_training
        from longrope2_ray.training.job import prepare as prepare_training

        recipe, run_dir = self.trial.recipe, RunDir(self.url)
        folder = training_dir(recipe, run_dir)
        if read_result(folder) is None:
            return False
        open_training(prepare_training(recipe, run_dir), folder)
        scored = folder.read_or_skip(TRAINED_FILE) or {}
        return scored.get("fingerprints") == self.report_fingerprints

    @property
    def report_fingerprints(self) -> dict[str, str]:
        """The fingerprints of the held-out needles."""
        names = [report_set(length) for length in self.report_lengths]
        return {name: self.prepared.fingerprints[f"needles {name}"] for name in names}

    @property
    def report_lengths(self) -> list[int]:
        """The lengths of the held-out needles."""
        recipe = self.trial.recipe
        return list(recipe.report.lengths or [recipe.search.target_length])


def prepare_study(study: Study, study_dir: RunDir) -> Sequence[PreparedTrial]:
    """Check every trial's model, texts, search space, data and run directory.

    Only the search's seed differs between the trials of a variant, so they share needles.

    Args:
        study: the loaded study.
        study_dir: its directory.

    Raises:
        ValueError: naming the variant and the recipe field.
    """
    of_variant: dict[str, Prepared] = {}
    jobs = []
    for trial in study.trials:
        url = f"{study_dir.absolute_url.rstrip('/')}/{trial.folder}"
        try:
            if trial.variant not in of_variant:
                of_variant[trial.variant] = prepare(trial.recipe)
            if trial.train:
                prepare_data(trial.recipe, url)
        except ValueError as error:
            raise ValueError(f"variant {trial.variant}: {error}") from error
        prepared = replace(of_variant[trial.variant], recipe=trial.recipe)
        jobs.append(PreparedTrial(trial, prepared, url))
    study_dir.create()
    for job in jobs:
        job.open()
    return jobs
