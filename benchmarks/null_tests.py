"""Level and power of the tests of patients on drawn counts. Prints JSON lines; it measures no time.

    python -m benchmarks.null_tests --latents 1000 --repeats 20

Persons are drawn without any difference between the groups, latent by latent: a person's share of active cells scatters
around the latent's (0.3 to 30 % of the cells, log-normal with a standard deviation of `--spread`), samples of a person
scatter around the person's, cells are active or not, and an active cell has a geometric number of active tokens.
`below_0.05` is the share of tested latents with p <= 0.05, which should be at most 0.05; `found` the mean number of
latents with q < 0.05 in a data set, and `any_found` the share of data sets with at least one, which should be at most
0.05.

Where persons are from two sites, the cells of every latent are active more or less often at the second one, by a
factor that is log-normal with a standard deviation of `--site`, and eight of ten persons of the first group are from
the first site, two of ten of the second group.

The last lines are of the classification of groups: the range of its balanced accuracies over data sets, the mean range
that holds 95 % of the shuffles, the share of data sets with p <= 0.05, and of those whose interval holds one half.

With two groups, the same is drawn again with one latent in ten whose cells are active `--fold` times as often in the
first group. `power_p` is the share of these with p <= 0.05, `power_q` of those with q < 0.05, and `false` the share of
other latents among all with q < 0.05.
"""

import argparse
import json
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cytosae.analysis.adjusted import compare_groups_adjusted
from cytosae.analysis.classification import classify_groups
from cytosae.analysis.classification_chance import shuffle_groups
from cytosae.analysis.classification_quality import balanced_accuracy_interval
from cytosae.analysis.differential import GroupComparison, Method, compare_groups
from cytosae.analysis.equal_cells import draw_equal
from cytosae.analysis.omnibus import OmnibusComparison, compare_all_groups
from cytosae.analysis.subjects import pool_samples
from cytosae.analysis.within_strata import compare_groups_within

_LEVEL = 0.05
_RARE, _FREQUENT = 0.003, 0.3
_TOKENS = 8
"""Mean number of active tokens of an active cell."""
_SAMPLE_SPREAD = 0.15
"""Standard deviation of the logarithm of a sample's share of active cells around its person's."""
_PLANTED = 10
"""One latent in this many differs where power is measured."""

Ints = npt.NDArray[np.int64]


class Study(NamedTuple):
    """Persons with samples and cells."""

    groups: Ints
    """Group of each person, shape `(U,)`."""
    images: Ints
    """Cells of each sample of a person, shape `(U,)`."""
    n_samples: int = 1
    """Samples of each person."""
    sites: Ints | None = None
    """Site of each person, 0 or 1, shape `(U,)`; None for one."""

    @classmethod
    def of(cls, persons: tuple[int, ...], images: tuple[int, ...], n_samples: int = 1) -> "Study":
        """Groups of some persons each, whose samples have some cells each."""
        groups = np.repeat(np.arange(len(persons)), persons)
        return cls(groups, np.array(images)[groups], n_samples)

    def at_sites(self) -> "Study":
        """The same persons at two sites, which have much to do with the groups."""
        place = np.concatenate([np.arange(size) / size for size in np.bincount(self.groups)])
        return self._replace(sites=np.where(place < 0.8, self.groups, 1 - self.groups))


class Cells(NamedTuple):
    """Drawn cells."""

    tokens: Ints
    """Active tokens, shape `(n_cells, S)`."""
    samples: Ints
    """Sample of each cell."""
    persons: Ints
    """Person of each cell."""


class Way(NamedTuple):
    """A test on a study."""

    name: str
    study: Study
    unit: str
    """What is a row of the test: `persons`, `samples`, or `cells` for equal numbers of cells of every person."""
    method: Method
    by_site: str = ""
    """How sites are taken into account: not, `within` them, or in a linear `model`."""


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=20, help="data sets of each line")
    parser.add_argument("--spread", type=float, default=0.5)
    parser.add_argument("--site", type=float, default=0.7)
    parser.add_argument("--fold", type=float, default=4.0)
    parser.add_argument("--shuffles", type=int, default=100, help="of the groups, for their classification")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", help="names of lines; default all")
    options = parser.parse_args()
    for way in ways():
        if options.only is None or way.name in options.only:
            line = {**_describe(way, options), **measure_level(way, options)}
            if way.study.groups.max() == 1:
                line |= {"fold": options.fold, **measure_power(way, options)}
            print(json.dumps(line), flush=True)
    if options.only is None or "classification" in options.only:
        for n in (3, 5, 10, 25):
            print(json.dumps(measure_classification(n, options)), flush=True)


def ways() -> Iterator[Way]:
    """Every line of the table."""
    for n in (3, 5, 10, 25):
        for method in ("mann-whitney", "permutation"):
            yield Way("no_covariate", Study.of((n, n), (200, 200)), "persons", method)
    yield Way("no_covariate", Study.of((3, 25), (200, 200)), "persons", "mann-whitney")
    for groups in ((4, 4, 4), (15, 15, 15)):
        yield Way("three_groups", Study.of(groups, (200, 200, 200)), "persons", "mann-whitney")
    for unit in ("samples", "persons"):
        yield Way("repeated_samples", Study.of((6, 6), (100, 100), 4), unit, "mann-whitney")
    for n, few in ((5, 50), (10, 350), (10, 250), (10, 100), (10, 50)):
        for unit in ("persons", "cells"):
            yield Way("unequal_cells", Study.of((n, n), (500, few)), unit, "mann-whitney")
    yield Way("unequal_cells", Study.of((10, 10), (500, 50)), "persons", "permutation")
    for n in (5, 10, 25):
        study = Study.of((n, n), (200, 200)).at_sites()
        for by_site in ("", "within", "model"):
            yield Way("confounded", study, "persons", "mann-whitney", by_site)
    yield Way("confounded", Study.of((10, 10), (200, 200)).at_sites(), "persons", "permutation", "within")
    for n in (5, 10, 25):
        yield Way("no_covariate", Study.of((n, n), (200, 200)).at_sites(), "persons", "mann-whitney", "model")


def draw(study: Study, n_latents: int, spread: float, rng: np.random.Generator, factor: object = 1.0) -> Cells:
    """Cells of a study; `factor` multiplies the share of active cells, shape `(U, S)` or a number."""
    n = len(study.groups)
    rate = np.exp(rng.uniform(np.log(_RARE), np.log(_FREQUENT), n_latents))
    person = rate * rng.lognormal(-(spread**2) / 2, spread, (n, n_latents)) * np.asarray(factor)
    samples = np.repeat(np.arange(n), study.n_samples)
    scatter = _SAMPLE_SPREAD if study.n_samples > 1 else 0.0
    share = np.minimum(person[samples] * rng.lognormal(-(scatter**2) / 2, scatter, (len(samples), n_latents)), 1)
    of = np.repeat(np.arange(len(samples)), study.images[samples])
    active = rng.random((len(of), n_latents), dtype=np.float32) < share[of]
    return Cells(np.where(active, rng.geometric(1 / _TOKENS, active.shape), 0), of, samples[of])


def apply_test(way: Way, cells: Cells, seed: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """P and q of the tested latents, NaN for the others; both of shape `(S,)`."""
    groups, rows = way.study.groups, np.arange(len(cells.tokens))
    units, n_units = cells.persons, len(groups)
    if way.unit == "samples":
        units, n_units = cells.samples, len(groups) * way.study.n_samples
        groups = np.repeat(groups, way.study.n_samples)
    elif way.unit == "cells":
        rows = draw_equal(units, n_units, int(np.bincount(units).min()), seed=seed)
    pooled = pool_samples(cells.tokens[rows], np.ones(len(rows), dtype=np.int64), units[rows], n_units)
    n_groups, counts, sites = int(groups.max()) + 1, pooled.counts, way.study.sites
    found: GroupComparison | OmnibusComparison
    if way.by_site == "within" and sites is not None:
        found = compare_groups_within(counts, groups == 0, sites, method=way.method, seed=seed, level=_LEVEL)
    elif way.by_site == "model" and sites is not None:
        found = compare_groups_adjusted(counts, groups == 0, sites[:, None].astype(np.float64), level=_LEVEL)
    elif n_groups == 2:
        found = compare_groups(counts, groups == 0, method=way.method, seed=seed, level=_LEVEL)
    else:
        found = compare_all_groups(counts, groups, n_groups, seed=seed, level=_LEVEL)
    return np.where(found.tested, found.p_value, np.nan), np.where(found.tested, found.q_value, np.nan)


def measure_level(way: Way, options: argparse.Namespace) -> dict[str, object]:
    """What a test says where nothing differs."""
    below, found = [], []
    for p, q in _repeat(way, options, 1.0):
        below.append(float((p <= _LEVEL).sum() / max(1, np.isfinite(p).sum())))
        found.append(int((q < _LEVEL).sum()))
    return {
        "below_0.05": round(float(np.mean(below)), 4),
        "found": round(float(np.mean(found)), 2),
        "any_found": round(float(np.mean(np.array(found) > 0)), 2),
    }


def measure_power(way: Way, options: argparse.Namespace) -> dict[str, object]:
    """What a test says where one latent in ten differs."""
    planted = np.arange(options.latents) % _PLANTED == 0
    in_first = way.study.groups == 0
    power_p, power_q, false = [], [], []
    for p, q in _repeat(way, options, np.where(in_first[:, None] & planted, options.fold, 1.0)):
        hits = q < _LEVEL
        power_p.append(float((p[planted] <= _LEVEL).mean()))
        power_q.append(float(hits[planted].mean()))
        false.append(float((hits & ~planted).sum() / max(1, hits.sum())))
    return {
        "power_p": round(float(np.mean(power_p)), 3),
        "power_q": round(float(np.mean(power_q)), 3),
        "false": round(float(np.mean(false)), 3),
    }


def measure_classification(n: int, options: argparse.Namespace) -> dict[str, object]:
    """What the classification of groups says where nothing differs: n persons against n."""
    study, found = Study.of((n, n), (200, 200)), []
    for repeat in range(options.repeats):
        rng = np.random.default_rng([options.seed, repeat])
        cells = draw(study, options.latents, options.spread, rng)
        pooled = pool_samples(cells.tokens, np.ones(len(cells.tokens), dtype=np.int64), cells.persons, 2 * n)
        made = classify_groups(pooled.counts, study.groups, ["one", "two"], seed=repeat)
        chance = shuffle_groups(pooled.counts, study.groups, seed=repeat, n_shuffles=options.shuffles)
        low, high = balanced_accuracy_interval(made.confusion)
        found.append(
            (
                chance.p_value(made.balanced_accuracy) <= _LEVEL,
                low <= 0.5 <= high,
                *chance.spread(),
                made.balanced_accuracy,
            )
        )
    below, holds, low, high, _ = np.mean(found, axis=0)
    accuracy = [row[-1] for row in found]
    return {
        "name": "null_tests",
        "case": "classification",
        "persons": [n, n],
        "latents": options.latents,
        "repeats": options.repeats,
        "shuffles": options.shuffles,
        "lowest": round(min(accuracy), 3),
        "highest": round(max(accuracy), 3),
        "spread": [round(float(low), 3), round(float(high), 3)],
        "p_below_0.05": round(float(below), 3),
        "interval_holds_half": round(float(holds), 3),
    }


def _repeat(
    way: Way, options: argparse.Namespace, factor: object
) -> Iterator[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]]:
    """P and q of each data set. Ways of looking at one study see the same ones."""
    for repeat in range(options.repeats):
        rng = np.random.default_rng([options.seed, repeat])
        both = np.asarray(factor) * np.ones((1, options.latents))
        if way.study.sites is not None and way.name == "confounded":
            at_second = rng.lognormal(0, options.site, options.latents)
            both = both * np.where(way.study.sites[:, None] == 1, at_second, 1.0)
        cells = draw(way.study, options.latents, options.spread, rng, both)
        yield apply_test(way, cells, repeat)


def _describe(way: Way, options: argparse.Namespace) -> dict[str, object]:
    """Names and sizes of a line."""
    study = way.study
    first = [int(np.flatnonzero(study.groups == group)[0]) for group in range(int(study.groups.max()) + 1)]
    several = len(first) > 2
    return {
        "name": "null_tests",
        "case": way.name,
        "persons": np.bincount(study.groups).tolist(),
        "samples": study.n_samples,
        "images": study.images[first].tolist(),
        "unit": {"cells": "persons, equal cells"}.get(way.unit, way.unit),
        "test": "kruskal-wallis" if several else "linear model" if way.by_site == "model" else way.method,
        "within": "sites" if way.by_site == "within" else "",
        "latents": options.latents,
        "repeats": options.repeats,
    }


if __name__ == "__main__":
    main()
