"""The group of the commands that make files of expert scores and work with them."""

from __future__ import annotations

import click

from shardsurgeon.cli.scores.baselines import (
    from_router_command,
    from_weights_command,
    random_command,
)
from shardsurgeon.cli.scores.compare import compare_command
from shardsurgeon.cli.scores.files import convert_command, merge_command
from shardsurgeon.cli.scores.show import show_command


class _InOrder(click.Group):
    """The commands in the order in which they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    "scores",
    cls=_InOrder,
    commands=[
        show_command,
        compare_command,
        convert_command,
        merge_command,
        from_router_command,
        from_weights_command,
        random_command,
    ],
    invoke_without_command=True,
    subcommand_metavar="COMMAND ...",
)
@click.pass_context
def scores_commands(context: click.Context) -> None:
    """Look at files of expert scores, and make some.

    \b
    Examples:
      shardsurgeon scores show scores.pt
      shardsurgeon scores compare scores.pt other.safetensors
      shardsurgeon scores merge monday.pt tuesday.pt -o both.pt
      shardsurgeon scores from-router /models/Kimi-K2.5 -o router.safetensors
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
