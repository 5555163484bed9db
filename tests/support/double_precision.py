"""The `shufflenet` command in double precision: its rounding is too small to hide a fault or to look like one."""

import torch

from shufflenet_mlflow.cli import main
from shufflenet_mlflow.data.preprocess import ToInput

torch.set_default_dtype(torch.float64)
single = ToInput.normalise
ToInput.normalise = lambda self, x_NCHW: single(self, x_NCHW).double()  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
