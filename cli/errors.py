"""Click's usage errors, with a stable code."""

import click


class UsageError(click.UsageError):
    """Arguments that cannot work together, or are missing.

    Args:
        code: names the error in `--json`; it stays when the message changes.
    """

    def __init__(self, message: str, ctx: click.Context | None = None, *, code: str) -> None:
        super().__init__(message, ctx)
        self.code = code


class BadParameter(click.BadParameter):
    """A value that cannot work.

    Args:
        code: as for `UsageError`.
    """

    def __init__(
        self,
        message: str,
        ctx: click.Context | None = None,
        param: click.Parameter | None = None,
        param_hint: str | None = None,
        *,
        code: str,
    ) -> None:
        super().__init__(message, ctx, param, param_hint)
        self.code = code
