"""What a folder or an archive holds, and its files one by one. Nothing is ever unpacked to disk.

    Folder    a directory tree; each real folder once, however many links lead to it
    Tar       compressed or not; a tar inside it is a folder of that name (ILSVRC2012_img_train.tar is a tar of tars)
    Zip       also as Windows writes it
    Parquet   rows of encoded images and labels, as Hugging Face keeps them; read by pyarrow
    Archives  a folder that holds nothing but archives: the published files of ImageNet, shards of webdataset, parquet

A picture is recognised by its ending or, if that says nothing, by its first bytes. Whatever else there is, is counted
in `left_out` by its kind. An archive is recognised by its content and is read to its end: a damaged header, a wrong
checksum, a missing end and anything behind the end are errors.

The members of a tar that is not compressed are not read while it is indexed; whoever decodes them reads them in place.
So a subset costs only its own bytes there, in a folder and in a zip.
"""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Self

from alexnet.data.pictures import ENDINGS, HEAD, MAX_BYTES, Payload, Slice, Unreadable, is_picture
from alexnet.errors import UserError

TEXTS = ("words.txt", "LOC_synset_mapping.txt", "LOC_val_solution.csv", "val_annotations.txt",
         "ILSVRC2012_validation_ground_truth.txt", "meta.mat")  # fmt: skip
OPENERS: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}  # by first bytes
ARCHIVES = (".tar", ".tgz", ".gz", ".bz2", ".xz", ".zip", ".parquet")
DAMAGE = (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError, ValueError)
PUBLISHED = re.compile(
    r"ILSVRC2012_(img_(train|val)\.tar|devkit_t12\.tar\.gz)|" + "|".join(map(re.escape, TEXTS))
)
SPLIT_NAMES = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
               "test": "test", "testing": "test"}  # fmt: skip
SAMPLES = 16  # files whose content is compared when a source is given again
SAMPLE_BYTES = 1 << 16  # of each, from its start and from its end


@dataclass
class Files:
    """A folder or an archive. Names are relative, with forward slashes, and stay as they are on disk (`shown`)."""

    path: Path
    pictures: dict[str, int] = field(default_factory=dict)  # {name: bytes of the encoded file}
    folders: set[str] = field(default_factory=set)  # all of them, also those without a picture
    texts: dict[str, bytes] = field(default_factory=dict)  # {name: content} of the lists of data sets (TEXTS)
    # {name without endings: number of its class} and {number: name}, where the files say so (.cls, parquet)
    numbers: dict[str, int] = field(default_factory=dict)
    class_names: dict[int, str] = field(default_factory=dict)
    left_out: Counter[str] = field(default_factory=Counter)  # how many files of each kind are not taken

    def stream(self, wanted: set[str]) -> Iterator[tuple[str, Payload]]:
        """Every wanted picture once, in the order that is cheapest to read."""
        raise NotImplementedError

    def _enter(self, name: str, size: int, opener: Callable[[], Any]) -> None:
        """One file, by its kind, which its content may have to tell."""

        def content(count: int) -> bytes:
            with opener() as file:
                return file.read(count)

        folder, _, base = name.rpartition("/")
        ending = PurePosixPath(base).suffix.lower()
        self.folders.add(folder)
        if is_hidden(name):
            self.left_out["hidden"] += 1
        elif ending in ENDINGS:
            self.pictures[name] = size
        elif base in TEXTS:
            self.texts[name] = content(MAX_BYTES)
        elif ending == ".cls":
            text = content(HEAD)
            try:
                self.numbers[stem(name)] = int(text)
            except ValueError as error:
                raise UserError(f"path={self.path}: {shown(name)} must hold the number of a class") from error
        elif size and is_picture(content(HEAD)):
            self.pictures[name] = size
        else:
            self.left_out[shown(ending) or "without ending"] += 1


def stem(name: str) -> str:
    """Folder and file name up to its first dot: what the files of one sample of webdataset share."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def shown(name: str) -> str:
    """A name for messages: in one line, and in characters that every file can hold."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


class Folder(Files):
    """A directory tree. Whoever decodes a file reads it."""

    def __init__(self, root: Path, walk: bool = True) -> None:
        super().__init__(root)
        self.archives: dict[str, int] = {}
        # First all that is reached without links; then the links, in the order found, to folders that are new.
        top, seen = str(root), {_identity(parent) for parent in root.resolve().parents}
        starts = [top] if walk else []
        for start in starts:  # which the links make longer
            for folder, below, files in os.walk(start, onerror=self._refuse):
                if (identity := _identity(folder)) in seen:
                    self.left_out["duplicate by link"] += 1
                    below.clear()
                    continue
                seen.add(identity)
                self.left_out.update("hidden" for name in (*below, *files) if is_hidden(name))
                below[:] = sorted((name for name in below if not is_hidden(name)), reverse=True)
                paths = (os.path.join(folder, name) for name in reversed(below))
                starts += filter(os.path.islink, paths)
                inside = folder.removeprefix(top).strip("/")
                self.folders.add(inside)
                for name in sorted(name for name in files if not is_hidden(name)):
                    self.enter_file(f"{inside}/{name}" if inside else name)

    def _refuse(self, error: OSError) -> None:
        folder = str(error.filename).removeprefix(str(self.path)).strip("/")
        raise UserError(
            f"path={self.path}: the folder {shown(folder) or '.'} cannot be read ({error.strerror}): "
            "mend its permissions, or move it elsewhere"
        ) from error

    def enter_file(self, name: str) -> None:
        path = self.path / name
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                self.left_out["neither file nor folder"] += 1
            elif name.lower().endswith(ARCHIVES):
                self.archives[name] = status.st_size
            else:
                self._enter(name, status.st_size, partial(open, path, "rb"))
        except OSError:
            if os.path.exists(path):
                self.left_out["unreadable"] += 1
            elif name.lower().endswith(ENDINGS):  # a link to nothing, which becomes a bad file
                self.pictures[name] = 0
            else:
                self.left_out["broken link"] += 1

    def stream(self, wanted: set[str]) -> Iterator[tuple[str, Payload]]:
        for name in sorted(wanted):
            yield name, self.path / name


def _identity(path: str | Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


class _Header(tarfile.TarInfo):
    """tarfile takes a damaged or missing header for the end of the archive; here it is an error."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the block of zeros that ends an archive
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {archive.offset}") from error


class Tar(Files):
    """A tar archive; what is compressed, `opener` opens."""

    def __init__(self, path: Path, opener: Callable[..., Any] | None) -> None:
        super().__init__(path)
        self.opener = opener
        self.offsets: dict[str, int] = {}
        with (opener or open)(path, "rb") as file:
            for name, member, offset, archive in self._members(file):
                if member.isdir():
                    self.folders.add(name)
                elif not _is_file(member):
                    self.left_out["link or device in an archive"] += 1
                elif name in self.pictures:
                    self.left_out["a second time"] += 1
                else:
                    self._enter(name, member.size, partial(archive.extractfile, member))
                    self.offsets[name] = offset

    def stream(self, wanted: set[str]) -> Iterator[tuple[str, Payload]]:
        if self.opener is None:
            for name in sorted(wanted, key=self.offsets.__getitem__):
                yield name, Slice(self.path, self.offsets[name], self.pictures[name])
            return
        remaining = set(wanted)
        with self.opener(self.path, "rb") as file:
            for name, member, _, archive in self._members(file):
                if _is_file(member) and name in remaining:
                    remaining.remove(name)
                    too_large = member.size > MAX_BYTES
                    yield name, _too_large(member.size) if too_large else archive.extractfile(member).read()
                if not remaining:
                    return

    def _members(
        self, file: Any, prefix: str = "", start: int = 0
    ) -> Iterator[tuple[str, tarfile.TarInfo, int, Any]]:
        """Of each member of the tar in `file`, which begins at byte `start`, the name, the header, where its content
        lies, and the archive that reads it; from front to back."""
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # a million of them would stay in memory
                name, offset = prefix + member.name, start + member.offset_data
                if _is_file(member) and name.endswith(".tar"):
                    inside = name.removesuffix(".tar") + "/"
                    yield from self._members(archive.extractfile(member), inside, offset)
                else:
                    yield _safe(name, self.path), member, offset, archive
        while block := file.read(1 << 20):  # to the end, where the checksum of a compressed file stands
            if block.count(0) != len(block):
                raise tarfile.ReadError("data behind its end, or a damaged block before it")


def _is_file(member: tarfile.TarInfo) -> bool:
    return member.isreg() and not member.sparse


class Zip(Files):
    """A zip archive. One member with a wrong checksum is one bad file."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.members: dict[str, zipfile.ZipInfo] = {}
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                name = _safe(info.filename.replace("\\", "/"), path)  # as Windows writes it
                if info.is_dir():
                    self.folders.add(name)
                elif name in self.members:
                    self.left_out["a second time"] += 1
                elif info.flag_bits & 1:
                    raise UserError(f"path={path} is protected by a password: unpack it and give the folder")
                else:
                    self.members[name] = info
                    self._enter(name, info.file_size, partial(archive.open, info))

    def stream(self, wanted: set[str]) -> Iterator[tuple[str, Payload]]:
        with zipfile.ZipFile(self.path) as archive:
            for name in sorted(wanted, key=lambda name: self.members[name].header_offset):
                info = self.members[name]
                if info.file_size > MAX_BYTES:
                    yield name, _too_large(info.file_size)
                    continue
                try:
                    payload: Payload = archive.read(info)
                except (*DAMAGE, NotImplementedError, RuntimeError) as error:
                    payload = Unreadable(str(error))
                yield name, payload


def _too_large(size: int) -> Unreadable:
    return Unreadable(f"a file of {size / 1e6:.0f} MB, more than {MAX_BYTES >> 20} MiB")


def _safe(name: str, archive: Path) -> str:
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts:
        raise UserError(f"path={archive} has the member {shown(name)}, which points outside: do not trust it")
    return str(parts)


class Parquet(Files):
    """A parquet file with a column of encoded images (bytes and path) and one of labels."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise UserError(f"path={path} needs pyarrow: python -m pip install -e '.[parquet]'") from error
        self.file = pyarrow.parquet.ParquetFile(path)
        schema = self.file.schema_arrow
        images = [
            f.name for f in schema if "bytes" in {f.type.field(i).name for i in range(f.type.num_fields)}
        ]
        labels = [f.name for f in schema if f.name in ("label", "labels") and "int" in str(f.type)]
        if not images or not labels:
            raise UserError(
                f"path={path} must have a column of images (bytes, path) and one named label, "
                f"but its columns are {', '.join(schema.names)}"
            )
        self.column = images[0]
        hints = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = hints.get("info", {}).get("features", {})
        self.class_names = dict(enumerate(features.get(labels[0], {}).get("names", [])))
        table = self.file.read(columns=[f"{self.column}.path", labels[0]])
        paths = table.column(self.column).combine_chunks().field("path").to_pylist()
        groups = [self.file.metadata.row_group(i) for i in range(self.file.num_row_groups)]
        size = sum(group.total_byte_size for group in groups) // max(len(paths), 1)
        for row, (name, label) in enumerate(zip(paths, table.column(labels[0]).to_pylist(), strict=True)):
            name = f"{row:08d}/{(name or f'{row:08d}').rpartition('/')[2]}"  # the row makes it unique
            self.pictures[name] = size
            self.numbers[stem(name)] = label

    def stream(self, wanted: set[str]) -> Iterator[tuple[str, Payload]]:
        names = list(self.pictures)
        first = 0
        for group in range(self.file.num_row_groups):
            here = names[first : first + self.file.metadata.row_group(group).num_rows]
            first += len(here)
            if wanted.isdisjoint(here):
                continue
            table = self.file.read_row_group(group, columns=[f"{self.column}.bytes"])
            contents = table.column(self.column).combine_chunks().field("bytes")
            for name, content in zip(here, contents, strict=True):
                if name in wanted:
                    yield name, content.as_py() or Unreadable("no bytes")


class Archives(Files):
    """Several archives as one tree, <split>/...; the split is a word of the archive's name.

    The members of an archive that names no split lie in a folder of the archive's name.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        super().__init__(path)
        self.parts: list[tuple[str, Files]] = []
        for name in sorted(names):
            base = stem(name).rpartition("/")[2]
            words = re.split(r"[^a-z]+", name.rpartition("/")[2].lower())
            split = next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "")
            if split == "test":
                self.left_out["archive of a test split"] += 1
                continue
            part = open_archive(path / name)
            prefix = f"{split}/{base}/" if split and part.numbers else f"{split or base}/"
            pictures = {prefix + inner: size for inner, size in part.pictures.items()}
            if twice := pictures.keys() & self.pictures.keys():
                raise UserError(f"path={path}: two archives hold {shown(min(twice))}: keep one of them")
            self.pictures |= pictures
            self.folders |= {prefix + folder for folder in part.folders}
            self.texts |= {prefix + inner: text for inner, text in part.texts.items()}
            self.numbers |= {prefix + inner: number for inner, number in part.numbers.items()}
            self.left_out += part.left_out
            self.class_names |= part.class_names
            part.numbers = {}
            self.parts.append((prefix, part))

    def stream(self, wanted: set[str]) -> Iterator[tuple[str, Payload]]:
        for prefix, part in self.parts:
            inside = {name for name in part.pictures if prefix + name in wanted}
            if inside:
                yield from ((prefix + name, payload) for name, payload in part.stream(inside))


def listing(path: Path) -> Folder:
    """The folder at `path`; of an archive, itself alone in its folder, or with the other published ones beside it."""
    if path.is_dir():
        return Folder(path)
    if not path.is_file():
        raise UserError(
            f"path={shown(str(path))} does not exist: give the archive or the folder of the images"
        )
    folder = Folder(path.parent, walk=False)
    together = PUBLISHED.fullmatch(path.name) and path.name.endswith(".tar")
    for name in sorted(os.listdir(path.parent)) if together else []:
        if PUBLISHED.fullmatch(name):
            folder.enter_file(name)
    folder.archives.setdefault(path.name, path.stat().st_size)
    return folder


def open_files(path: Path, folder: Folder) -> Files:
    """What `folder`, the `listing` of `path`, gives; UserError for an archive that is not whole."""
    if path.is_dir() and (folder.pictures or not folder.archives):
        folder.left_out.update(PurePosixPath(name).suffix.lower() for name in folder.archives)
        return folder
    if not path.is_dir() and len(folder.archives) == 1:
        return open_archive(path)
    files = Archives(folder.path, folder.archives)
    files.texts |= folder.texts
    files.left_out += folder.left_out
    return files


def open_archive(path: Path) -> Files:
    """The archive, by its content; UserError if it is not whole."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD)
        if is_picture(head):
            raise UserError(f"path={path} is one picture: give the folder or the archive of all of them")
        if head.startswith((b"PK\3\4", b"PK\5\6")):
            return Zip(path)
        if head.startswith(b"PAR1"):
            return Parquet(path)
        return Tar(path, next((opener for magic, opener in OPENERS.items() if head.startswith(magic)), None))
    except UserError:
        raise
    except DAMAGE as error:
        raise UserError(
            f"path={path} is not a whole archive ({' '.join(str(error).split())}): fetch it again"
        ) from error


def fingerprint(folder: Folder) -> dict[str, Any]:
    """What a store remembers of its source, to be compared when a source is given again.

    Names, sizes and the first and last bytes of a few files: no archive is read through for it.
    """
    texts = {name: len(text) for name, text in folder.texts.items()}
    sizes = dict(sorted((folder.pictures | folder.archives | texts).items()))
    contents = hashlib.sha256()
    for name in list(sizes)[:: max(len(sizes) // SAMPLES, 1)]:
        try:
            with open(folder.path / name, "rb") as file:
                contents.update(file.read(SAMPLE_BYTES))
                file.seek(max(sizes[name] - SAMPLE_BYTES, 0))
                contents.update(file.read(SAMPLE_BYTES))
        except OSError:
            contents.update(b"unreadable")

    def digest(values: list[Any]) -> str:
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    return {
        "place": shown(str(folder.path.resolve())),
        "files": len(sizes),
        "names": digest(list(sizes)),
        "sizes": digest(list(sizes.values())),
        "contents": contents.hexdigest(),
    }
