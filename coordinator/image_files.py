"""Images in files: a folder, a tar archive, a folder inside an archive, or the arrays of an .npz.

Archives are read member by member and never unpacked, so that nothing in them can be written
anywhere. The order of the images is that of their names, on every machine.
"""

from __future__ import annotations

import io
import lzma
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from edge_teacher.contract.errors import UsageError

Images = NDArray[np.uint8]

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".bmp": "BMP", ".webp": "WEBP"}
_MAX_FILE_BYTES = 64 << 20
_MAX_PIXELS = 16 << 20


def size_of(images: NDArray[np.uint8]) -> str:
    """Of [N, H, W, …], for people."""
    return f"{images.shape[1]}x{images.shape[2]}"


# Files: a folder, an archive, or a folder inside an archive.


def image_files(path: Path) -> list[tuple[PurePosixPath, bytes]]:
    """(name relative to `path`, content) of every image file, sorted by name."""
    return files_and_texts(path, ())[0]


def files_and_texts(
    path: Path, texts: tuple[str, ...]
) -> tuple[list[tuple[PurePosixPath, bytes]], dict[str, str]]:
    """The image files, and the content of those of `texts` that lie right in `path`, by name.

    Raises UsageError without an image, or for a text that is not UTF-8.
    """

    def wanted(name: PurePosixPath) -> bool:
        return is_image(name) or name.name in texts

    archive, inside = _split_archive(path)
    found = _archive_files(archive, inside, wanted) if archive else _folder_files(path, wanted)
    every = sorted(found, key=lambda file: file[0].parts)
    files = [(name, content) for name, content in every if is_image(name)]
    if not files:
        raise UsageError(f"{path} has no images; image files end in {', '.join(sorted(FORMATS))}.")
    try:
        said = {
            str(name): content.decode("utf-8-sig") for name, content in every if str(name) in texts
        }
    except UnicodeDecodeError as error:
        raise UsageError(
            f"One of {', '.join(texts)} in {path} is not text in UTF-8; save it as such."
        ) from error
    return files, said


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


def _folder_files(
    path: Path, wanted: Callable[[PurePosixPath], bool]
) -> Iterator[tuple[PurePosixPath, bytes]]:
    for file in path.rglob("*"):
        name = PurePosixPath(file.relative_to(path).as_posix())
        if wanted(name) and file.is_file():
            _require_small(path, name, file.stat().st_size)
            try:
                yield name, file.read_bytes()
            except OSError as error:
                raise UsageError(f"{file} cannot be read: {error.strerror}.") from error


def _archive_files(
    archive: Path, inside: PurePosixPath, wanted: Callable[[PurePosixPath], bool]
) -> Iterator[tuple[PurePosixPath, bytes]]:
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
                if not member.isfile() or not name.is_relative_to(inside) or not wanted(name):
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


def is_image(name: PurePosixPath) -> bool:
    hidden = any(part.startswith(".") for part in name.parts)
    return name.suffix.lower() in FORMATS and not hidden


def _require_small(path: Path, name: PurePosixPath, size: int) -> None:
    if size > _MAX_FILE_BYTES:
        raise UsageError(f"{name} in {path} has {size:,} bytes; {_MAX_FILE_BYTES:,} is the limit.")


def decode(path: Path, files: list[tuple[PurePosixPath, bytes]]) -> Images:
    """Files as uint8[N, H, W, 3] in their order. Raises UsageError if one is not of the first's size."""
    return _stacked(path, files, decode_one)


def decode_masks(path: Path, files: list[tuple[PurePosixPath, bytes]]) -> Images:
    """Masks as uint8[N, H, W]: the palette's index or the grey value of every pixel. Raises UsageError."""
    return _stacked(path, files, _mask)


def _stacked(
    path: Path,
    files: list[tuple[PurePosixPath, bytes]],
    read: Callable[[Path, PurePosixPath, bytes], Images],
) -> Images:
    first_name, first_content = files[0]
    first = read(path, first_name, first_content)
    images = np.empty((len(files), *first.shape), dtype=np.uint8)
    images[0] = first
    for i, (name, content) in enumerate(files[1:], start=1):
        image = read(path, name, content)
        if image.shape != first.shape:
            raise UsageError(
                f"{path} has images of different sizes: {first_name} has {size_of(first[None])} "
                f"pixels and {name} {size_of(image[None])}; bring them to one size."
            )
        images[i] = image
    return images


def decode_one(path: Path, name: PurePosixPath, content: bytes) -> Images:
    """uint8[H, W, 3], turned upright as the camera noted. Raises UsageError."""
    return _pixels(path, name, content, lambda image: ImageOps.exif_transpose(image).convert("RGB"))


def read_picture(path: Path) -> Images:
    """One image file as uint8[H, W, 3]. Raises UsageError."""
    name = PurePosixPath(path.name)
    if not is_image(name):
        raise UsageError(f"{path} is no image; image files end in {', '.join(sorted(FORMATS))}.")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
    return decode_one(path.parent, name, content)


def _mask(path: Path, name: PurePosixPath, content: bytes) -> Images:
    """uint8[H, W] as the file has it."""

    def index(image: Image.Image) -> Image.Image:
        if image.format != "PNG" or image.mode not in ("P", "L"):
            raise UsageError(
                f"The mask {name} in {path} is {image.format} in mode {image.mode}; it must be a PNG "
                "with a palette, or grey of 8 bits, whose values are the classes."
            )
        return image.copy()

    return _pixels(path, name, content, index)


def _pixels(
    path: Path,
    name: PurePosixPath,
    content: bytes,
    convert: Callable[[Image.Image], Image.Image],
) -> Images:
    too_large = (
        f"{name} in {path} has more pixels than any image here may; {_MAX_PIXELS:,} is the limit."
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # The format is the one that the suffix names: other decoders have no business here.
            with Image.open(io.BytesIO(content), formats=[FORMATS[name.suffix.lower()]]) as image:
                if image.width * image.height > _MAX_PIXELS:
                    raise UsageError(too_large)
                return np.asarray(convert(image), dtype=np.uint8)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UsageError(too_large) from error
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise UsageError(
            f"{name} in {path} is not a readable image ({_reason(error)}); repair or remove it."
        ) from error


def _reason(error: Exception) -> str:
    return "not in the format its name says" if "BytesIO" in str(error) else str(error)


# .npz


def npz_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    if not path.is_file():
        raise UsageError(f"There is no data set at {path}.")
    if not zipfile.is_zipfile(path):
        # numpy would take it for a pickle, and say so.
        raise UsageError(
            f"{path} is not a readable .npz file (no zip archive: it is cut off, or another kind of file)."
        )
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in ("images", "labels", "classes") if name in file}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is not a readable .npz file ({error}).") from error


def npz_images(path: Path, arrays: dict[str, NDArray[np.generic]]) -> Images:
    images = arrays.get("images")
    if images is None:
        raise UsageError(f"{path} has no array called 'images'; it must be uint8 [N, H, W, 3].")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or 0 in images.shape:
        raise UsageError(
            f"'images' in {path} is {images.dtype} {list(images.shape)}; "
            "it must be uint8 [N, H, W, 3]."
        )
    return images.astype(np.uint8, copy=False)
