import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coordinator.data import read_labelled, read_task, read_unlabelled
from edge_teacher.contract.errors import UsageError

MINI = Path(__file__).parents[2] / "examples" / "data" / "cifar10-mini.tar.xz"


def png(colour: tuple[int, int, int], size: tuple[int, int] = (6, 4), **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG", **options)
    return buffer.getvalue()


FILES = {
    "cat/b.png": png((1, 2, 3)),
    "cat/a.png": png((4, 5, 6)),
    "ant/z.png": png((7, 8, 9)),
}


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w:xz") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def test_a_folder_and_every_kind_of_tar_of_it_read_the_same(tmp_path: Path) -> None:
    expected = read_labelled(write_folder(tmp_path / "set", FILES))
    assert expected.classes == ("ant", "cat")
    assert expected.labels.tolist() == [0, 1, 1]
    # Height comes first, and images are in the order of their names.
    assert expected.images.shape == (3, 4, 6, 3)
    assert expected.images[:, 0, 0].tolist() == [[7, 8, 9], [4, 5, 6], [1, 2, 3]]
    for suffix, mode in ((".tar", "w"), (".tar.gz", "w:gz"), (".tar.xz", "w:xz")):
        inside = {f"./deep/set/{name}": content for name, content in FILES.items()}
        archive = write_tar(tmp_path / f"set{suffix}", inside, mode)
        found = read_labelled(archive / "deep" / "set")
        assert found.classes == expected.classes
        assert np.array_equal(found.images, expected.images)
        assert np.array_equal(found.labels, expected.labels)


def test_an_npz_reads_like_a_folder(tmp_path: Path) -> None:
    expected = read_labelled(write_folder(tmp_path / "set", FILES))
    np.savez(
        tmp_path / "set.npz",
        images=expected.images,
        labels=expected.labels.astype(np.uint8),
        classes=np.array(expected.classes),
    )
    found = read_labelled(tmp_path / "set.npz")
    assert found.classes == expected.classes
    assert np.array_equal(found.images, expected.images)
    assert np.array_equal(found.labels, expected.labels)
    assert np.array_equal(read_unlabelled(tmp_path / "set.npz"), expected.images)


def test_other_files_and_hidden_ones_are_no_images(tmp_path: Path) -> None:
    extra = {"README.md": b"x", "cat/notes.txt": b"x", "cat/._a.png": b"x", ".git/x.png": b"x"}
    assert len(read_labelled(write_folder(tmp_path, FILES | extra))) == 3


def test_grey_and_turned_images_become_upright_rgb(tmp_path: Path) -> None:
    Image.new("L", (6, 4), 9).save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn a quarter
    Image.new("RGB", (4, 6), (1, 1, 1)).save(tmp_path / "b.png", exif=exif)
    assert read_unlabelled(tmp_path).shape == (2, 4, 6, 3)


def labels_npz(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path / "set.npz", **arrays)
    return path / "set.npz"


PIXELS = np.zeros((3, 4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p / "nowhere", "no data set at"),
        (lambda p: write_folder(p, {"x.txt": b""}), "has no images"),
        (lambda p: write_folder(p, {"a.png": png((0, 0, 0))}), "not <class>/<name>"),
        (lambda p: write_folder(p, {"a/b/c.png": png((0, 0, 0))}), "not <class>/<name>"),
        (lambda p: write_folder(p, {"a/x.png": b"no image"}), "a/x.png in .* not a readable image"),
        (lambda p: write_folder(p, {"a/x.png": png((1, 1, 1))[:-30]}), "not a readable image"),
        (lambda p: write_folder(p, {"a/x.jpg": png((1, 1, 1))}), "not a readable image"),
        (
            lambda p: write_folder(p, FILES | {"cat/c.png": png((0, 0, 0), (5, 5))}),
            "different sizes: .* 4x6 .* cat/c.png 5x5",
        ),
        (lambda p: write_folder(p, {"x.tar": b"no tar"}) / "x.tar", "not a readable tar"),
        (lambda p: write_tar(p / "x.tar.xz", {"../a/x.png": png((0, 0, 0))}), "outside"),
        (lambda p: write_tar(p / "x.tar.xz", {"/a/x.png": png((0, 0, 0))}), "outside"),
        (lambda p: write_folder(p, {"x.npz": b"no npz"}) / "x.npz", "not a readable .npz"),
        (lambda p: write_folder(p, {"x.npz": b"\x80\x04K\x01."}) / "x.npz", "no zip archive"),
        (lambda p: labels_npz(p, labels=np.zeros(3, int)), "no array called 'images'"),
        (lambda p: labels_npz(p, images=PIXELS), "no array called 'labels'"),
        (lambda p: labels_npz(p, images=PIXELS / 2, labels=np.zeros(3, int)), "uint8"),
        (lambda p: labels_npz(p, images=PIXELS[..., 0], labels=np.zeros(3, int)), "uint8"),
        (lambda p: labels_npz(p, images=PIXELS, labels=np.zeros(2, int)), r"integers \[3\]"),
        (lambda p: labels_npz(p, images=PIXELS, labels=np.zeros(3)), r"integers \[3\]"),
        (lambda p: labels_npz(p, images=PIXELS, labels=np.array([0, -1, 0])), "from -1 to 0"),
        (
            lambda p: labels_npz(
                p, images=PIXELS, labels=np.array([0, 2, 0]), classes=np.array(["a", "b"])
            ),
            "must run from 0 to 1",
        ),
    ],
)
def test_an_unusable_set_is_one_sentence(tmp_path: Path, make, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        read_labelled(make(tmp_path))


def test_a_truncated_archive_is_refused(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "x.tar.xz", FILES).read_bytes()
    (tmp_path / "x.tar.xz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match="not a readable tar"):
        read_labelled(tmp_path / "x.tar.xz")


def test_links_in_an_archive_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(png((1, 1, 1)))
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        link = tarfile.TarInfo("cat/x.png")
        link.type = tarfile.SYMTYPE
        link.linkname = str(tmp_path / "secret.png")
        tar.addfile(link)
    with pytest.raises(UsageError, match="has no images"):
        read_labelled(tmp_path / "x.tar")


def test_the_sets_of_a_task_must_belong_together(tmp_path: Path) -> None:
    probe = write_folder(tmp_path / "probe", FILES)
    one_class = write_folder(tmp_path / "one", {"cat/a.png": png((0, 0, 0))})
    large = write_folder(tmp_path / "large", {"a.png": png((0, 0, 0), (8, 8))})
    other = write_folder(
        tmp_path / "other", {"ant/a.png": FILES["ant/z.png"], "dog/a.png": png((1, 1, 1))}
    )
    with pytest.raises(UsageError, match="of the class 'cat' only"):
        read_task(one_class, probe)
    with pytest.raises(UsageError, match=r"8x8 pixels and .* of 4x6"):
        read_task(probe, large)
    with pytest.raises(UsageError, match="different classes: 'cat', 'dog'"):
        read_task(probe, probe, other)
    assert read_task(probe, probe, probe).test is not None


def test_the_example_data_is_what_its_readme_says() -> None:
    data = read_task(MINI / "probe", MINI / "transfer", MINI / "test")
    assert np.bincount(data.probe.labels).tolist() == [50] * 10
    assert data.transfer.shape == (4000, 32, 32, 3)
    assert data.test is not None
    assert np.bincount(data.test.labels).tolist() == [100] * 10
    assert MINI.stat().st_size <= 3_000_000
    # No image is in two of the sets.
    everything = np.concatenate([data.probe.images, data.transfer, data.test.images])
    assert len({image.tobytes() for image in everything}) == 5500


def test_a_dense_set_is_not_taken_for_two_classes(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "0.png")
    with pytest.raises(UsageError, match="which is a dense set and not two classes"):
        read_labelled(tmp_path)
