"""`shufflenet completion`: scripts that let a shell complete commands, options, networks, runs and aliases."""

import os

import click
from click.shell_completion import (
    BashComplete,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
    split_arg_string,
)

from .commands import Command
from .options import common_options

PROGRAM = "shufflenet"
VARIABLE = "_SHUFFLENET_COMPLETE"

_BASH = """\
%(complete_func)s() {
    local IFS=$'\\n' response completion type value before=""
    # Bash breaks words at : and @, which references contain; only the text after the last one is replaced.
    local word="${COMP_LINE:0:COMP_POINT}"
    word="${word##* }"
    [[ "$word" == *[:@=]* ]] && before="${word%%"${word##*[:@=]}"}"
    response=$(env COMP_WORDS="${COMP_LINE:0:COMP_POINT}" %(complete_var)s=bash_complete $1)
    for completion in $response; do
        IFS=',' read -r type value <<< "$completion"
        if [[ $type == 'dir' ]]; then
            COMPREPLY=()
            compopt -o dirnames
        elif [[ $type == 'file' ]]; then
            COMPREPLY=()
            compopt -o default
        elif [[ $type == 'plain' ]]; then
            COMPREPLY+=("${value#"$before"}")
        fi
    done
    return 0
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""


class _Bash(BashComplete):
    """Completes words as they were typed, not as bash breaks them."""

    source_template = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        line = os.environ["COMP_WORDS"]
        words = split_arg_string(line)[1:]
        return (words, "") if line.endswith(" ") or not words else (words[:-1], words[-1])


SHELLS: dict[str, type[ShellComplete]] = {"bash": _Bash, "zsh": ZshComplete, "fish": FishComplete}

HOW_TO = {
    "bash": f"for every new shell: echo 'eval \"$({PROGRAM} completion bash)\"' >> ~/.bashrc",
    "zsh": f"for every new shell: echo 'eval \"$({PROGRAM} completion zsh)\"' >> ~/.zshrc",
    "fish": f"for every new shell: {PROGRAM} completion fish > ~/.config/fish/completions/{PROGRAM}.fish",
}

for shell in SHELLS.values():
    add_completion_class(shell)


@click.command(cls=Command)
@click.argument("shell", metavar="SHELL", type=click.Choice(list(SHELLS)))
@common_options
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the completion script for bash, zsh or fish.

    TAB then completes commands, options, networks, run IDs, runs:/ID and models:/NAME@ALIAS of the store in use.

    \b
    Examples:
      eval "$(shufflenet completion bash)"
      shufflenet completion fish > ~/.config/fish/completions/shufflenet.fish
    """
    from .console import next_steps

    click.echo(SHELLS[shell](ctx.find_root().command, {}, PROGRAM, VARIABLE).source())
    next_steps(HOW_TO[shell])
