"""Problems a user can solve: one clear line on stderr and exit code 2, never a traceback."""

import io
import sys
from collections.abc import Callable


class UserError(Exception):
    """Its message names the argument or file, what came and what was expected, in one line."""


def require(holds: bool, name: str, must: str, got: object) -> None:
    """UserError unless the argument ``name`` is as it must be."""
    if not holds:
        raise UserError(f"{name} must {must}, got {got}")


def tell(error: UserError) -> None:
    print(f"error: {error}", file=sys.stderr)


def run_command(main: Callable[[], int | None]) -> None:
    """Run a command's ``main`` and leave with its exit code; the end of every ``__main__``.

    Names of files and classes that the locale has no characters for are printed escaped. A file
    that the system refuses, wherever one asks for it, is a problem a user can solve.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = main()
    except UserError as error:
        tell(error)
        code = 2
    except OSError as error:
        if error.filename is None:
            raise
        tell(UserError(f"{error.filename}: {error.strerror}"))
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
