"""The sets of images that a command can name: an image folder, or the bundled digits."""

from pathlib import Path

from shufflenet_mlflow.config import (
    default_cache_dir,
)
from shufflenet_mlflow.data.digits import cached_digits
from shufflenet_mlflow.data.folder import list_images, require_images_only
from shufflenet_mlflow.data.listing import ImageListing

DIGITS_NAME = "digits"


def data_name(directory: str | None) -> str:
    """What to call a data set: its folder's name, or the one above a folder called train or val."""
    if directory is None:
        return DIGITS_NAME
    path = Path(directory)
    generic = ("train", "training", "val", "valid", "validation", "test")
    return path.parent.name if path.name.lower() in generic and path.parent.name else path.name


def list_folder(
    directory: str | None, part: str, *, option: str, skip_bad: bool, cache_dir: Path | None
) -> ImageListing:
    """List `directory`, or that part of the bundled digits.

    Raises:
        DataError: see `list_images`; or it holds other files than images, and `skip_bad` is False.
    """
    cache_dir = cache_dir or default_cache_dir()
    if directory is None:
        return list_images(cached_digits(cache_dir) / part)
    listing = list_images(directory, option=option)
    if not skip_bad:
        require_images_only(listing, option=option)
    return listing
