"""The package's logger, which says warnings even where the root logger's level is above them.

MLflow's autologging and others set that level to ERROR, in the middle of a script; a warning that a checkpoint waits on
the disk has to be seen all the same. A level that is set on the logger `shufflenet_mlflow` itself holds as usual.
"""

import logging


class PackageLogger(logging.Logger):
    """A logger whose level, while none is set, is WARNING where the root logger's is higher."""

    _own_level = logging.NOTSET

    @property
    def level(self) -> int:
        """The level that was set, or NOTSET to go by the root logger's; see the class."""
        is_hushed = self._own_level == logging.NOTSET and self.root.level > logging.WARNING
        return logging.WARNING if is_hushed else self._own_level

    @level.setter
    def level(self, value: int) -> None:
        self._own_level = value


def make_package_logger() -> None:
    """Create the logger `shufflenet_mlflow`, unless the program that imports the package has done so."""
    others = logging.getLoggerClass()
    logging.setLoggerClass(PackageLogger)
    try:
        logging.getLogger("shufflenet_mlflow")
    finally:
        logging.setLoggerClass(others)
