"""Try every verb that writes with a kill or a failing call at many instants, and add the counts to docs/faults.md.

    PYTHONPATH=.:cache:pipeline python scripts/fault_campaign.py --kills 40 --failures 25
    PYTHONPATH=.:cache:pipeline python scripts/fault_campaign.py --stage train --kills 10 --failures 0 --seed 7
    PYTHONPATH=.:cache:pipeline python scripts/fault_campaign.py --mutations 60

With `--mutations`, every kind of input file is mutated instead, and read by the real verbs.

Kills and failing calls need strace, which may watch processes (as root in a container it may). Their table grows with
every run: instants of another seed are further instants. Exit code 1 if anything was wrong; each problem is printed
when it is found.
"""

import argparse
import collections
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from cytosae_cache.storage.lock import locked
from tests.support.fault_stages import IMPORTS, STAGES
from tests.support.fault_trials import Outcome, Trials, find_strace
from tests.support.mutation_kinds import make_kinds
from tests.support.mutation_trials import Kind, MutationTrials, Tried
from tests.support.nursery import Nursery

TABLE = Path(__file__).parents[1] / "docs" / "faults.md"
HEADER = ("verb", "killed at", "right after retry", "calls that failed", "right after retry ")
BEGIN, END = "<!-- campaign: begin -->", "<!-- campaign: end -->"
MUTATED_HEADER = ("file", "read by", "tried", "refused", "same results", "said so", "other data", "peak, MB")
MUTATED_BEGIN, MUTATED_END = "<!-- mutations: begin -->", "<!-- mutations: end -->"


def main() -> None:
    """Run the campaign."""
    options = read_options()
    if options.mutations:
        sys.exit(mutate_files(options))
    if reason := find_strace():
        sys.exit(reason)
    os.environ["SOURCE_DATE_EPOCH"] = "1700000000"
    wrong = 0
    for stage in STAGES:
        if options.stage and stage.name not in options.stage:
            continue
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="cytosae-faults-") as folder, Nursery(imports=IMPORTS) as nursery:
            trials = Trials(stage, Path(folder) / "trials", nursery)
            outcomes = [
                *watch(trials.kills(options.kills, options.seed)),
                *watch(trials.failures(options.failures, options.seed)),
            ]
        bad = [outcome for outcome in outcomes if outcome.problems]
        wrong += len(bad)
        print(
            f"{stage.name}: {len(outcomes)} instants, {len(bad)} wrong, {time.monotonic() - started:.0f} s", flush=True
        )
        if options.table:
            add_row(stage.name, outcomes)
    sys.exit(1 if wrong else 0)


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stage", action="append", help="only this stage; repeatable", choices=[s.name for s in STAGES]
    )
    parser.add_argument("--kills", type=int, default=40, help="instants per stage")
    parser.add_argument("--failures", type=int, default=25, help="failing calls per stage")
    parser.add_argument("--mutations", type=int, default=0, metavar="N", help="mutate each kind of file N times")
    parser.add_argument("--kind", action="append", default=[], help="only kinds whose name contains this; repeatable")
    parser.add_argument("--seed", type=int, default=0, help="chooses the instants, or is the first mutation's")
    parser.add_argument("--table", action="store_true", help="add the counts to docs/faults.md")
    return parser.parse_args()


def watch(outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    """Print problems as they come."""
    for outcome in outcomes:
        for problem in outcome.problems:
            where = f"{outcome.stage}, {outcome.fault} at {outcome.instant.call} {outcome.instant.number}"
            print(f"WRONG {where}: {problem}", flush=True)
        yield outcome


def add_row(name: str, outcomes: list[Outcome]) -> None:
    """Add the counts of a stage to the table; several campaigns may run at once."""
    with locked(TABLE.with_name("faults.md.lock"), str(TABLE)):
        _add_row(name, outcomes)


def _add_row(name: str, outcomes: list[Outcome]) -> None:
    text = TABLE.read_text()
    before, _, rest = text.partition(BEGIN)
    table, _, after = rest.partition(END)
    lines = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:] if line.strip()]
    rows = {row[0]: [int(cell) for cell in row[1:]] for row in lines}
    counts = rows.setdefault(name, [0, 0, 0, 0])
    for outcome in outcomes:
        at = 0 if outcome.fault == "kill" else 2
        if outcome.reached:
            counts[at] += 1
            counts[at + 1] += not outcome.problems
    every = [[name, *map(str, cells)] for name, cells in rows.items()]
    made = "\n".join(f"| {' | '.join(row)} |" for row in [[h.strip() for h in HEADER], ["---"] * 5, *every])
    TABLE.write_text(f"{before}{BEGIN}\n{made}\n{END}{after}")


def mutate_files(options: argparse.Namespace) -> int:
    """Mutate files of every kind; 1 if anything was wrong."""
    os.environ["SOURCE_DATE_EPOCH"] = "1700000000"
    wrong = 0
    seeds = range(options.seed, options.seed + options.mutations)
    with tempfile.TemporaryDirectory(prefix="cytosae-faults-") as folder, Nursery(imports=IMPORTS) as nursery:
        trials = MutationTrials(Path(folder), nursery)
        for kind in make_kinds():
            if options.kind and not any(text in kind.name for text in options.kind):
                continue
            every = []
            for tried in trials.run(kind, seeds):
                every.append(tried)
                wrong += bool(tried.problems)
                for problem in tried.problems:
                    print(f"WRONG {kind.name}, {tried.verb}, {tried.mutation} ({tried.seed}): {problem}", flush=True)
            row = describe_mutations(kind, every)
            print(" | ".join(row), flush=True)
            if options.table:
                with locked(TABLE.with_name("faults.md.lock"), str(TABLE)):
                    replace_row(row)
    return min(wrong, 1)


def describe_mutations(kind: Kind, every: list[Tried]) -> list[str]:
    """The row of a kind in the table."""
    counts = collections.Counter(tried.verdict for tried in every)
    numbers = [len(every), *(counts[verdict] for verdict in ("refused", "same", "told", "data"))]
    peak = max(tried.ended.peak_bytes for tried in every)
    return [kind.name, ", ".join(f"`{verb}`" for verb in kind.commands), *map(str, numbers), f"{peak / 1e6:.0f}"]


def replace_row(row: list[str]) -> None:
    """Put a row into the table of mutations, in place of an older one of the same kind."""
    before, _, rest = TABLE.read_text().partition(MUTATED_BEGIN)
    table, _, after = rest.partition(MUTATED_END)
    lines = [line.strip("| ").split(" | ") for line in table.strip().splitlines()[2:] if line.strip()]
    rows = {line[0]: line for line in lines} | {row[0]: row}
    order = [kind.name for kind in make_kinds()]
    every = [MUTATED_HEADER, ["---"] * len(MUTATED_HEADER), *(rows[name] for name in order if name in rows)]
    made = "\n".join(f"| {' | '.join(line)} |" for line in every)
    TABLE.write_text(f"{before}{MUTATED_BEGIN}\n{made}\n{MUTATED_END}{after}")


if __name__ == "__main__":
    main()
