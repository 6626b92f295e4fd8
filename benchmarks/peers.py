"""Other programs' trainers against ours, on the same batches in the same order.

    python -m benchmarks.peers --store PATH --arch batchtopk topk jumprelu matryoshka --k 32 --steps 500

Each program is installed in an environment of its own, once, and trains with its own trainer. What it saves is read by
`cytosae.load` and evaluated on held-out images with the formulas of `evaluate`. Prints one JSON line per run and a
Markdown table; a run whose line is in `--out` is not run again, so a campaign can be stopped and continued.
docs/comparison.md says what is compared and how.
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

from benchmarks.campaign.caching import measure_caches
from benchmarks.campaign.data import Data
from benchmarks.campaign.environments import RIVALS, EnvironmentFailedError, default_folder, make_environment
from benchmarks.campaign.plan import (
    ARCHS,
    OURS,
    Campaign,
    Line,
    Run,
    Setting,
    best_setting,
    key_of,
    table_runs,
    tuning_runs,
)
from benchmarks.campaign.table import make_cache_table, make_table
from benchmarks.campaign.training import (
    RunFailedError,
    Sizes,
    adapter_command,
    describe,
    own_python,
    train_and_evaluate,
)
from benchmarks.measure import print_line
from cytosae_cache.errors import StoreError
from cytosae_pipeline.errors import UserError


def main() -> None:
    """Run the benchmark."""
    try:
        run(parse(sys.argv[1:]))
    except (EnvironmentFailedError, RunFailedError, StoreError, UserError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("stopped; with --out, the same command goes on where it stopped")


def run(options: argparse.Namespace) -> None:
    """Do what the options ask for."""
    if options.table is not None:
        print(make_table(read_lines(options.table)))
        return
    if options.cache:
        compare_caches(options)
        return
    campaign = make_campaign(options)
    sizes = Sizes(
        options.steps, options.batch_images, options.expansion, options.held_out, options.threads, options.device
    )
    with Data(options.store, options.held_out, options.batch_images) as data:
        session = Session(data, sizes, options.environments, options.out)
        session.run_all(tuning_runs(campaign))
        session.run_all(table_runs(campaign, session.best_settings(campaign)))
    print(f"\n{make_table(session.lines)}")
    sys.exit(1 if session.n_failed else 0)


def compare_caches(options: argparse.Namespace) -> None:
    """Carry out `--cache`."""
    with Data(options.store, options.held_out, options.batch_images) as data:
        lines = measure_caches(
            data, tuple(options.programs), options.environments, n_images=options.cache_images,
            rounds=options.cache_rounds, n_threads=options.threads, folder=options.cache_folder,
        )  # fmt: skip
    for line in lines:
        print_line(line)
    print(f"\n{make_cache_table(lines)}")


class Session:
    """Carries out runs and keeps their lines.

    Args:
        data: The store.
        sizes: Sizes of all runs.
        environments: Folder of the programs' environments.
        out: File that lines are appended to; None keeps them only in memory.
    """

    def __init__(self, data: Data, sizes: Sizes, environments: Path, out: Path | None) -> None:
        self._data, self._sizes, self._environments, self._out = data, sizes, environments, out
        self.lines: list[Line] = read_lines(out) if out is not None and out.exists() else []
        """All lines, also those of earlier sessions."""
        self.n_failed = 0
        """Runs without a line."""

    def run_all(self, runs: list[Run]) -> None:
        """Carry out runs that have no line; one that fails is reported, and the others go on."""
        for run in runs:
            key = key_of({**run._asdict(), **describe(self._sizes, self._data)})
            same = [line for line in self.lines if key_of(line) == key]
            if any(line["settings"] == run.settings for line in same):
                continue
            try:
                line = {**same[0], "settings": run.settings} if same else self._run(run)
            except RunFailedError as error:
                print(error, file=sys.stderr)
                self.n_failed += 1
                continue
            self.lines.append(line)
            print_line(line)
            if self._out is not None:
                with self._out.open("a") as file:
                    file.write(json.dumps(line) + "\n")

    def best_settings(self, campaign: Campaign) -> dict[tuple[str, str], Setting | None]:
        """The best candidate of each program and architecture."""
        about = describe(self._sizes, self._data)
        best = {}
        for program, arch in campaign.trained():
            wanted = {"program": program, "arch": arch, "k": campaign.ks[0], "seed": campaign.seeds[0], **about}
            lines = [
                line
                for line in self.lines
                if line["settings"] == "tuning" and all(line[name] == value for name, value in wanted.items())
            ]
            best[program, arch] = best_setting(campaign.candidates(program, arch), lines)
        return best

    def _run(self, run: Run) -> Line:
        python = own_python() if run.program == OURS else make_environment(run.program, self._environments)
        return train_and_evaluate(run, self._sizes, self._data, adapter_command(run.program, python))


def read_lines(path: Path) -> list[Line]:
    """The lines of a file.

    Raises:
        UserError: If there is no such file, or a line is not JSON.
    """
    if not path.exists():
        raise UserError(f"'{path}' does not exist: give --table the file that was given as --out")
    lines = []
    for number, text in enumerate(path.read_text().splitlines(), 1):
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise UserError(f"line {number} of '{path}' is not a whole line of JSON: delete it") from error
    return lines


def make_campaign(options: argparse.Namespace) -> Campaign:
    """What the options ask for."""
    given: dict[tuple[str, str], Setting] = {}
    for text in options.rate:
        name, _, value = text.partition("=")
        program, _, arch = name.partition(":")
        rate, comma, scaled = value.partition(",")
        known = program in RIVALS and arch in ("", *ARCHS) and scaled == ("scaled" if comma else "")
        if not known or re.fullmatch(r"[0-9.]+(e-?[0-9]+)?", rate) is None:
            raise SystemExit(
                f"--rate {text}: give a program ({', '.join(RIVALS)}) and a rate, as in saelens=3e-4 or "
                "saelens:topk=3e-4,scaled"
            )
        given |= {(program, one): Setting(float(rate), bool(comma)) for one in ([arch] if arch else ARCHS)}
    return Campaign(
        tuple(options.programs), tuple(options.arch), tuple(options.k), tuple(options.seeds), tuple(options.rates),
        given, options.tune_scaling, options.tuned_only,
    )  # fmt: skip


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--store", type=Path, help="a complete store")
    add("--programs", nargs="+", choices=[*RIVALS, OURS], default=[*RIVALS, OURS])
    add("--arch", nargs="+", choices=ARCHS, default=list(ARCHS))
    add("--k", type=int, nargs="+", default=[32], help="active latents; learning rates are tuned at the first")
    add("--seeds", type=int, nargs="+", default=[0], help="seeds of weights and order; tuned at the first")
    add("--steps", type=int, default=500)
    add("--expansion", type=int, default=8, help="latents per channel")
    add("--batch-images", type=int, default=16, help="a batch has as many tokens as so many images")
    add("--held-out", type=float, default=0.1, help="share of the images to evaluate on, chosen by a hash")
    add("--rates", type=float, nargs="+", default=[], help="learning rates to try for every other program")
    add(
        "--rate",
        nargs="+",
        default=[],
        metavar="PROGRAM[:ARCH]=RATE[,scaled]",
        help="learning rates that need no tuning",
    )
    add("--tune-scaling", action="store_true", help="try each program's option that scales activations, too")
    add("--tuned-only", action="store_true", help="leave out default settings of programs with --rates or --rate")
    add("--threads", type=int, default=1, help="threads of every training process")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where all programs train")
    add("--environments", type=Path, default=default_folder(), help="folder of the programs' environments")
    add("--out", type=Path, help="file that lines are appended to, and continued from")
    add("--table", type=Path, metavar="FILE", help="only print the table of these lines")
    add("--cache", action="store_true", help="compare caches of activations instead: time to write and to read")
    add("--cache-images", type=int, default=512)
    add("--cache-rounds", type=int, default=5)
    add("--cache-folder", type=Path, default=Path(tempfile.gettempdir()), help="where caches are written")
    options = parser.parse_args(arguments)
    if options.table is None and options.store is None:
        parser.error("give --store, or --table to print the table of measured lines")
    if not 0 < options.held_out < 1:
        parser.error(
            f"--held-out is the share of images to evaluate on, above 0 and below 1, found {options.held_out:g}"
        )
    if min(options.steps, options.batch_images, options.expansion, *options.k) < 1:
        parser.error("--steps, --batch-images, --expansion and --k must be at least 1")
    return options


if __name__ == "__main__":
    main()
