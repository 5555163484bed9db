"""Data sets that a command can name: an image folder, or the bundled digits."""

from pathlib import Path

from shufflenet_mlflow.config import default_cache_dir
from shufflenet_mlflow.data.digits import cached_digits
from shufflenet_mlflow.data.folder import list_images, require_images_only
from shufflenet_mlflow.data.listing import ImageListing

DIGITS_NAME = "digits"


def data_name(directory: str | None) -> str:
    """Return a data set's name: that of its folder, or of the parent of a folder called train, val or similar."""
    if directory is None:
        return DIGITS_NAME
    path = Path(directory)
    generic = ("train", "training", "val", "valid", "validation", "test")
    return path.parent.name if path.name.lower() in generic and path.parent.name else path.name


def list_folder(
    directory: str | None, split: str, *, option: str, skip_bad: bool, cache_dir: Path | None
) -> ImageListing:
    """List `directory`, or the bundled digits if it is None.

    Args:
        split: of the digits, `train` or `val`.
        option: what to call the folder in messages.
        skip_bad: allow files that are not images.
        cache_dir: where the digits are kept; by default in the user's cache folder.

    Raises:
        DataError: see `list_images`; or it holds files that are not images, and `skip_bad` is False.
    """
    cache_dir = cache_dir or default_cache_dir()
    if directory is None:
        return list_images(cached_digits(cache_dir) / split)
    listing = list_images(directory, option=option)
    if not skip_bad:
        require_images_only(listing, option=option)
    return listing
