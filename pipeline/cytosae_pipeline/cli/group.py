"""The command `cytosae-cache` itself, and what all its verbs share."""

import functools
from collections.abc import Callable
from typing import Any

import click

from cytosae_pipeline import __version__
from cytosae_pipeline.cli.options import CONTEXT_SETTINGS, VerbCommand
from cytosae_pipeline.cli.output import log_to_stderr, messages
from cytosae_pipeline.runtime.cluster_client import keep_connected
from cytosae_pipeline.runtime.ranks import require_one_process
from cytosae_pipeline.runtime.shortage import explained_shortage

_ORDER = (
    "build", "import", "train", "evaluate", "compare", "features", "classes", "patients", "report", "explore",
    "ratings", "export", "apply", "list", "info", "verify", "demo",
)  # fmt: skip


class _InOrder(click.Group):
    """Lists the verbs in the order in which they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self.commands, key=_ORDER.index)


@click.group(cls=_InOrder, context_settings={**CONTEXT_SETTINGS, "auto_envvar_prefix": "CYTOSAE"})
@click.version_option(__version__, prog_name="cytosae-cache")
def cli() -> None:
    """Cache a vision transformer's activations of blood cells once; train and read sparse autoencoders on them.

    \b
    Try it, no data needed:   cytosae-cache demo
    With your own images:
      cytosae-cache build    --dataset_name mll23 --images IMAGES --model_path DinoBloom-B.pth
      cytosae-cache train    --dataset_name mll23 --use_ghost_grads --batch_size 64
      cytosae-cache features --dataset_name mll23 --sae_path latest
      cytosae-cache patients --dataset_name mll23 --sae_path latest
      cytosae-cache report   --dataset_name mll23 --sae_path latest

    Option names may be written with _ or -. Every verb has --help.

    Environment variables stand for options that are not given: CYTOSAE_ROOT_DIR for --root_dir of every verb,
    CYTOSAE_TRAIN_BATCH_SIZE for --batch_size of train, and so on (CYTOSAE_VERB_OPTION).

    \b
    Let the Tab key complete verbs and options (bash; zsh_source and fish_source for these):
      eval "$(_CYTOSAE_CACHE_COMPLETE=bash_source cytosae-cache)"
    """


json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print the result as JSON on stdout; messages and progress stay on stderr."
)


def verb(
    function: Callable[..., Any], kind: type[VerbCommand] = VerbCommand, *, in_ranks: bool = False
) -> click.Command:
    """Register a verb: `--json`, and errors as messages. A trailing _ of the function's name is left out.

    Args:
        function: What the verb does.
        kind: Class of the command, which writes its help.
        in_ranks: Whether several processes that torchrun starts do it together; otherwise they are refused.
    """
    name = function.__name__.rstrip("_")

    @functools.wraps(function)
    def run(**values: Any) -> None:
        with messages(), log_to_stderr(), explained_shortage(values), keep_connected():
            if not in_ranks:
                require_one_process(name)
            function(**values)

    return cli.command(name, cls=kind, context_settings=CONTEXT_SETTINGS)(json_option(run))
