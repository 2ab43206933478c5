"""Data sets: an image folder, a tar archive of one, or an .npz file.

Labelled sets are `<class>/<name>.jpg` or an .npz with `images` and `labels`; unlabelled ones are
images at any depth, or an .npz with `images`. A folder inside an archive is named by its path:
`photos.tar.xz/probe`. Archives are read member by member and never unpacked, so that nothing in
them can be written anywhere. The order of the images is that of their names, on every machine.
"""

from __future__ import annotations

import io
import lzma
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from coordinator.config import DataConfig
from edge_teacher.contract.errors import UsageError

Images = NDArray[np.uint8]

_FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP"}
_MAX_FILE_BYTES = 64 << 20
_MAX_PIXELS = 16 << 20


@dataclass(frozen=True)
class LabelledImages:
    """images uint8[N, H, W, 3]; labels int64[N], indices into `classes`."""

    images: Images
    labels: NDArray[np.int64]
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)


def spread(labelled: LabelledImages, most: int) -> LabelledImages:
    """At most `most` of the images: as many of every class as there are, up to an equal share."""
    if len(labelled) <= most:
        return labelled
    present, counts = np.unique(labelled.labels, return_counts=True)
    share = most // len(present)
    while np.minimum(counts, share + 1).sum() <= most:
        share += 1
    rows = [np.flatnonzero(labelled.labels == label)[: max(share, 1)] for label in present]
    chosen = np.sort(np.concatenate(rows))
    return LabelledImages(labelled.images[chosen], labelled.labels[chosen], labelled.classes)


@dataclass(frozen=True)
class TaskData:
    """The user's new task. All sets have images of one size, and `test` the classes of `probe`.

    `test` only measures what came out; nothing is ever chosen by it.
    """

    probe: LabelledImages
    transfer: Images
    test: LabelledImages | None = None


def read_task(probe: Path, transfer: Path, test: Path | None = None) -> TaskData:
    """Read the sets of one task and check that they belong together. Raises UsageError."""
    probe_set = read_labelled(probe)
    present = np.unique(probe_set.labels)
    if len(present) < 2:
        raise UsageError(
            f"The probe set {probe} has images of the class "
            f"{probe_set.classes[int(present[0])]!r} only; give labelled images of two or more."
        )
    transfer_images = read_unlabelled(transfer)
    _require_size(transfer_images, transfer, probe_set.images, probe)
    if test is None:
        return TaskData(probe_set, transfer_images)
    test_set = read_labelled(test)
    _require_size(test_set.images, test, probe_set.images, probe)
    if test_set.classes != probe_set.classes:
        odd = sorted(set(test_set.classes) ^ set(probe_set.classes))
        raise UsageError(
            f"The test set {test} and the probe set {probe} have different classes: "
            f"{', '.join(map(repr, odd[:5]))} in only one of them; give both the same ones."
        )
    return TaskData(probe_set, transfer_images, test_set)


def read_configured_task(config: DataConfig) -> TaskData:
    """`read_task` of the paths in a configuration, an empty one being no test set."""
    test = Path(config.test) if config.test else None
    return read_task(Path(config.probe), Path(config.transfer), test)


def read_labelled(path: Path) -> LabelledImages:
    """The labelled set at `path`. Raises UsageError, whose sentence says what is wrong with it."""
    if path.suffix == ".npz":
        return _labelled_npz(path)
    files: list[tuple[str, PurePosixPath, bytes]] = []
    for name, content in _image_files(path):
        if len(name.parts) != 2:
            raise UsageError(
                f"{path} has the image {name}, which is not <class>/<name>; "
                "a labelled set has one folder per class and the images right inside it."
            )
        files.append((name.parts[0], name, content))
    classes = tuple(sorted({label for label, _, _ in files}))
    index = {label: i for i, label in enumerate(classes)}
    images = _decode(path, [(name, content) for _, name, content in files])
    labels = np.array([index[label] for label, _, _ in files], dtype=np.int64)
    return LabelledImages(images, labels, classes)


def read_unlabelled(path: Path) -> Images:
    """The images at `path`, at any depth, as uint8[N, H, W, 3]. Raises UsageError."""
    if path.suffix == ".npz":
        return _npz_images(path, _npz_arrays(path))
    return _decode(path, list(_image_files(path)))


def read_picture(path: Path) -> Images:
    """One image file as uint8[H, W, 3]. Raises UsageError."""
    name = PurePosixPath(path.name)
    if not _is_image(name):
        raise UsageError(f"{path} is no image; image files end in {', '.join(sorted(_FORMATS))}.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    return _decode_one(path.parent, name, content)


def read_photographs(path: Path, size: tuple[int, int], most: int) -> Images:
    """At most `most` of the images at `path`, evenly spread, each brought to `size` (H, W).

    Raises UsageError.
    """
    if path.suffix == ".npz":
        every = list(_npz_images(path, _npz_arrays(path)))
    else:
        files = list(_image_files(path))
        chosen = np.linspace(0, len(files) - 1, min(most, len(files))).astype(int)
        every = [_decode_one(path, *files[i]) for i in chosen]
    chosen = np.linspace(0, len(every) - 1, min(most, len(every))).astype(int)
    height, width = size
    pictures = [Image.fromarray(every[i]).resize((width, height)) for i in chosen]
    return np.stack([np.asarray(picture, np.uint8) for picture in pictures])


def _require_size(images: Images, path: Path, probe_images: Images, probe: Path) -> None:
    if images.shape[1:] != probe_images.shape[1:]:
        raise UsageError(
            f"{path} has images of {_size(images)} pixels and {probe} of {_size(probe_images)}; "
            "bring both to one size."
        )


def _size(images: Images) -> str:
    return f"{images.shape[1]}x{images.shape[2]}"


# Files: a folder, an archive, or a folder inside an archive.


def _image_files(path: Path) -> list[tuple[PurePosixPath, bytes]]:
    """(name relative to `path`, content) of every image file, sorted by name."""
    archive, inside = _split_archive(path)
    found = _archive_files(archive, inside) if archive else _folder_files(path)
    files = sorted(found, key=lambda file: file[0].parts)
    if not files:
        raise UsageError(f"{path} has no images; image files end in {', '.join(sorted(_FORMATS))}.")
    return files


def _split_archive(path: Path) -> tuple[Path | None, PurePosixPath]:
    """`a/b.tar.xz/probe` -> (`a/b.tar.xz`, `probe`); (None, …) for a folder."""
    if path.is_dir():
        return None, PurePosixPath()
    for candidate in (path, *path.parents):
        if candidate.is_file():
            return candidate, PurePosixPath(path.relative_to(candidate))
    raise UsageError(
        f"There is no data set at {path}; give an image folder, a tar of one or an .npz."
    )


def _folder_files(path: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    for file in path.rglob("*"):
        name = PurePosixPath(file.relative_to(path).as_posix())
        if _is_image(name) and file.is_file():
            _require_small(path, name, file.stat().st_size)
            try:
                yield name, file.read_bytes()
            except OSError as error:
                raise UsageError(f"{file} cannot be read: {error.strerror}.") from error


def _archive_files(archive: Path, inside: PurePosixPath) -> Iterator[tuple[PurePosixPath, bytes]]:
    # A name may come twice in a tar; as when unpacking, the last one counts.
    files: dict[PurePosixPath, bytes] = {}
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if ".." in name.parts or name.is_absolute():
                    raise UsageError(
                        f"{archive} has a member called {member.name!r}, outside the archive; "
                        "make it again with plain relative names."
                    )
                # Links and devices are no files: what they point to is not the archive's to give.
                if not member.isfile() or not name.is_relative_to(inside) or not _is_image(name):
                    continue
                _require_small(archive, name, member.size)
                content = tar.extractfile(member)
                if content is not None:
                    files[name.relative_to(inside)] = content.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise UsageError(
            f"{archive} is not a readable tar archive ({error}); "
            "give an image folder, a tar of one or an .npz."
        ) from error
    yield from files.items()


def _is_image(name: PurePosixPath) -> bool:
    hidden = any(part.startswith(".") for part in name.parts)
    return name.suffix.lower() in _FORMATS and not hidden


def _require_small(path: Path, name: PurePosixPath, size: int) -> None:
    if size > _MAX_FILE_BYTES:
        raise UsageError(f"{name} in {path} has {size:,} bytes; {_MAX_FILE_BYTES:,} is the limit.")


def _decode(path: Path, files: list[tuple[PurePosixPath, bytes]]) -> Images:
    first_name, first_content = files[0]
    first = _decode_one(path, first_name, first_content)
    images = np.empty((len(files), *first.shape), dtype=np.uint8)
    images[0] = first
    for i, (name, content) in enumerate(files[1:], start=1):
        image = _decode_one(path, name, content)
        if image.shape != first.shape:
            raise UsageError(
                f"{path} has images of different sizes: {first_name} has {_size(first[None])} "
                f"pixels and {name} {_size(image[None])}; bring them to one size."
            )
        images[i] = image
    return images


def _decode_one(path: Path, name: PurePosixPath, content: bytes) -> Images:
    """uint8[H, W, 3], turned upright as the camera noted."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return _pixels(path, name, content)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UsageError(
            f"{name} in {path} claims more pixels than any image here may have; "
            f"{_MAX_PIXELS:,} is the limit."
        ) from error


def _pixels(path: Path, name: PurePosixPath, content: bytes) -> Images:
    try:
        # The format is the one that the suffix names: other decoders have no business here.
        with Image.open(io.BytesIO(content), formats=[_FORMATS[name.suffix.lower()]]) as image:
            if image.width * image.height > _MAX_PIXELS:
                raise UsageError(
                    f"{name} in {path} has {image.width}x{image.height} pixels; "
                    f"{_MAX_PIXELS:,} in all is the limit."
                )
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise UsageError(
            f"{name} in {path} is not a readable image ({_reason(error)}); repair or remove it."
        ) from error
    return np.asarray(upright, dtype=np.uint8)


def _reason(error: Exception) -> str:
    return "not in the format its name says" if "BytesIO" in str(error) else str(error)


# .npz


def _npz_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    if not path.is_file():
        raise UsageError(f"There is no data set at {path}.")
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in ("images", "labels", "classes") if name in file}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is not a readable .npz file ({error}).") from error


def _npz_images(path: Path, arrays: dict[str, NDArray[np.generic]]) -> Images:
    images = arrays.get("images")
    if images is None:
        raise UsageError(f"{path} has no array called 'images'; it must be uint8 [N, H, W, 3].")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise UsageError(
            f"'images' in {path} is {images.dtype} {list(images.shape)}; "
            "it must be uint8 [N, H, W, 3]."
        )
    return images.astype(np.uint8, copy=False)


def _labelled_npz(path: Path) -> LabelledImages:
    arrays = _npz_arrays(path)
    images = _npz_images(path, arrays)
    labels = arrays.get("labels")
    if labels is None:
        raise UsageError(f"{path} has no array called 'labels'; it must be integers [N].")
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
        raise UsageError(
            f"'labels' in {path} is {labels.dtype} {list(labels.shape)}; "
            f"it must be integers [{len(images)}], one for each image."
        )
    indices = labels.astype(np.int64)
    if "classes" in arrays:
        classes = tuple(str(name) for name in arrays["classes"].ravel())
    else:
        classes = tuple(str(i) for i in range(max(int(indices.max()) + 1, 1)))
    if indices.min() < 0 or indices.max() >= len(classes):
        raise UsageError(
            f"'labels' in {path} runs from {indices.min()} to {indices.max()}; "
            f"with {len(classes)} classes it must run from 0 to {len(classes) - 1}."
        )
    return LabelledImages(images, indices, classes)
