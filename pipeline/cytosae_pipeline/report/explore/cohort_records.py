"""Records of the patients' views, each part computed when it is first needed. One thread at a time."""

from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from cytosae_pipeline.config import PageConfig
from cytosae_pipeline.report.data.cohort import Cohort
from cytosae_pipeline.report.explore.errors import MissingError
from cytosae_pipeline.report.records.audit import Audit, audit_cohort, audit_record
from cytosae_pipeline.report.records.comparisons import (
    Comparisons,
    all_groups_record,
    compare_all,
    comparison_record,
    plan_comparisons,
)
from cytosae_pipeline.report.records.patients import patients_record


class CohortRecords:
    """What the page shows about patients.

    Args:
        cohort: The patients; None if the images have none, and everything is missing.
        latents: Latents of the barcodes, shape `(M,)`.
        config: Options.
    """

    def __init__(self, cohort: Cohort | None, latents: npt.NDArray[np.int64], config: PageConfig) -> None:
        self._found, self._latents, self._config = cohort, latents, config

    def patients(self) -> dict[str, Any]:
        """The patients.

        Raises:
            MissingError: If the images have none.
        """
        pairs = plan_comparisons(self._cohort)
        config = self._config
        return patients_record(self._cohort, self._latents, pairs, seed=config.seed, shuffles=config.shuffles)

    def comparison(self, number: int) -> dict[str, Any]:
        """One comparison of groups.

        Raises:
            MissingError: If there is no comparison of this number.
        """
        if not 0 <= number < len(self._made.pairs):
            raise MissingError
        return comparison_record(self._made, number, self._cohort, self._config.group_test, self._audit)

    def all_groups(self) -> dict[str, Any]:
        """All groups compared at once.

        Raises:
            MissingError: If there are fewer than three.
        """
        if self._made.all_groups is None:
            raise MissingError
        return all_groups_record(self._made, self._cohort)

    def audit(self) -> dict[str, Any]:
        """What is known about the patients beside the group, and what it tells.

        Raises:
            MissingError: If the images have no patients.
        """
        return audit_record(self._audit, self._cohort)

    @property
    def _cohort(self) -> Cohort:
        if self._found is None:
            raise MissingError
        return self._found

    @cached_property
    def _audit(self) -> Audit:
        return audit_cohort(self._cohort, seed=self._config.seed)

    @cached_property
    def _made(self) -> Comparisons:
        """All comparisons: a q over all needs them."""
        return compare_all(self._cohort, test=self._config.group_test, seed=self._config.seed)
