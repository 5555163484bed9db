"""The mean image: computed, written, read, refused, subtracted."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from shufflenet_mlflow.data.decode import open_picture
from shufflenet_mlflow.data.folder import (
    list_images,
)
from shufflenet_mlflow.data.loader import (
    BadImageLog,
)
from shufflenet_mlflow.data.mean import check_output, mean_image, read_mean_image, write_mean_image
from shufflenet_mlflow.data.preprocess import (
    Preprocess,
    eval_transform,
)
from shufflenet_mlflow.data.reading import Reading
from shufflenet_mlflow.errors import CheckpointError, ConfigError, DataError
from shufflenet_mlflow.runtime.progress import LoggingReporter
from shufflenet_mlflow.runtime.signals import StopFlag


def test_the_mean_image_is_the_mean(images: Path, tmp_path: Path) -> None:
    listing = list_images(images / "train")
    mean = mean_image(
        listing, 32, workers=0, bad_images=BadImageLog(skip=False), reporter=LoggingReporter(), stop=StopFlag()
    )
    transform = eval_transform(Preprocess("bgr255", 32))
    pixels = np.stack(
        [transform(open_picture(str(listing.root / sample.path), Reading())).numpy() for sample in listing.samples]
    )
    expected = pixels.astype(np.float64).mean(0)
    assert mean.shape == (32, 32, 3)
    np.testing.assert_allclose(mean.transpose(2, 0, 1), expected, rtol=1e-6)
    for name in ("mean.npy", "mean.xml"):
        write_mean_image(tmp_path / name, mean)
        assert np.array_equal(read_mean_image(tmp_path / name).numpy(), mean.transpose(2, 0, 1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mean.npy", "mean.xml"]


def test_opencvs_xml_is_read_as_opencv_reads_it(tmp_path: Path) -> None:
    mean = np.random.default_rng(0).random((4, 4, 3)) * 255
    storage = cv2.FileStorage(str(tmp_path / "mean.xml"), cv2.FILE_STORAGE_WRITE)
    storage.write("Other", np.zeros((2, 2)))
    storage.write("MeanImg", mean)  # in double precision
    storage.release()
    torch.testing.assert_close(read_mean_image(tmp_path / "mean.xml"), torch.tensor(mean).permute(2, 0, 1).float())


def npy_header(shape: str) -> bytes:
    """Return the header of an .npy file with this shape, without data."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", None, "does not exist; `shufflenet data mean DIR` makes one"),
        ("a.npy", b"", "does not hold an array of numbers"),
        ("a.npy", b"hello", "does not hold an array of numbers"),
        ("a.npy", np.array([{}], object), "does not hold an array of numbers"),
        ("a.npy", np.zeros((3, 4, 4)), r"is float64 of shape \(3, 4, 4\), not numbers of shape \(height, width, 3\)"),
        ("a.npy", np.full((4, 4, 3), 0.5), "spans 0.5 to 0.5; it must be on the 0-255 scale"),
        ("a.npy", np.full((4, 4, 3), np.nan), "spans nan to nan"),
        ("a.npy", np.full((4, 4, 3), -1), "spans -1 to -1"),
        ("a.npy", np.zeros((0, 4, 3)), "not numbers of"),
        ("a.npy", npy_header("(100000, 100000, 3)"), "does not hold an array of numbers"),
        ("a.npy", npy_header("(99999999999999999999, 3, 3)"), "does not hold an array of numbers"),
        ("a.npy", npy_header("(4, 4, 3"), "does not hold an array of numbers"),
        ("a.xml", b"<?xml version='1.0'?>" + b"<a>" * 100_000, "does not hold OpenCV XML"),
        ("a.xml", b"", "does not hold OpenCV XML with a matrix 'MeanImg'"),
        ("a.xml", b"hello", "does not hold OpenCV XML"),
        ("a.xml", b"<?xml version='1.0'?><opencv_storage><A>1</A></opencv_storage>", "does not hold OpenCV XML"),
        ("a.xml", b"<?xml version='1.0'?><opencv_storage><MeanImg>1</MeanImg></opencv_storage>", "does not hold"),
        ("a.xml", b"<?xml version='1.0'?><opencv_storage><MeanImg type_id='opencv-matrix'><rows>4", "does not hold"),
    ],
)
def test_invalid_mean_images(name: str, content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content, allow_pickle=True)
    with pytest.raises(DataError, match=message) as caught:
        read_mean_image(path)
    assert repr(str(path)) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_mean_image_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot write the mean image '/dev/null/x.npy': File exists"):
        write_mean_image(Path("/dev/null/x.npy"), np.full((4, 4, 3), 100, np.float32))


def test_black_images_have_no_mean_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mean.npy' spans 0 to 0"):
        write_mean_image(tmp_path / "mean.npy", np.zeros((4, 4, 3), np.float32))
    assert not list(tmp_path.iterdir())


def test_a_mean_image_is_called_by_its_format(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mean.png\) must be a .npy file, or .xml"):
        read_mean_image(tmp_path / "mean.png")
    with pytest.raises(ConfigError, match=r"mean.png\) must be a .npy file, or .xml"):
        check_output(tmp_path / "mean.png")
    with pytest.raises(DataError, match=r"x.npy': it is a folder"):
        (tmp_path / "x.npy").mkdir()
        check_output(tmp_path / "x.npy")


def test_a_mean_image_must_fit() -> None:
    with pytest.raises(ConfigError, match="the mean image has 64x32 pixels, the input 32x32"):
        Preprocess("bgr255_mean", 32, torch.zeros(3, 32, 64))
    with pytest.raises(ConfigError, match="a mean image is for networks with bgr255_mean input, not bgr255"):
        Preprocess("bgr255", 32, torch.zeros(3, 32, 32))


def test_preprocessing_survives_a_checkpoint() -> None:
    preprocess = Preprocess("bgr255_mean", 32, torch.rand(3, 32, 32))
    restored = Preprocess.from_dict(preprocess.to_dict())
    assert restored == preprocess
    assert restored.has_mean_of(preprocess)
    assert not restored.has_mean_of(Preprocess("bgr255_mean", 32))
    for strange in ({"mean_image": 5}, {"mean_image": torch.zeros(3)}, {"input_size": "x"}, {"mode": "hsv"}):
        with pytest.raises(CheckpointError, match="preprocessing .* is not understood"):
            Preprocess.from_dict({**preprocess.to_dict(), **strange})
