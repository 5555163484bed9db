"""The `shufflenet` command in double precision: rounding stays far too small there to hide, or to pass for, a fault."""

import torch

from shufflenet_mlflow.cli import main
from shufflenet_mlflow.data.preprocess import ToInput

torch.set_default_dtype(torch.float64)
single = ToInput.__call__
ToInput.__call__ = lambda self, *images: single(self, *images).double()  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
