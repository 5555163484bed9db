"""`python -m shufflenet_mlflow`: the `shufflenet` command.

It works in a bare checkout too, where nothing is installed and the folder `cli` lies beside this package instead of
in it; that is how `mlflow run` starts it in an environment that holds the dependencies only.
"""

import signal
from importlib.util import find_spec
from pathlib import Path

import shufflenet_mlflow

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) == signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports leaves no traceback; `main` takes it back

if find_spec("shufflenet_mlflow.cli") is None:
    shufflenet_mlflow.__path__.append(str(Path(__file__).parent.parent))

from shufflenet_mlflow.cli import main

if __name__ == "__main__":
    main()
