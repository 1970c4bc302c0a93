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
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, Self

from alexnet.data.pictures import ENDINGS, HEAD, MAX_BYTES, Payload, Slice, Unreadable, is_picture
from alexnet.errors import UserError

TEXTS = ("words.txt", "LOC_synset_mapping.txt", "LOC_val_solution.csv", "val_annotations.txt",
         "ILSVRC2012_validation_ground_truth.txt", "meta.mat")  # fmt: skip
OPENERS: dict[bytes, Any] = {
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


class Files:
    """A folder or an archive. Names are relative, with forward slashes, and stay as they are on disk (`shown`).

    Attributes:
        pictures: {name: bytes of the encoded file}.
        folders: all folders, also those without a picture.
        texts: {name: content} of the lists that come with data sets (TEXTS).
        numbers: {name without endings: number of its class}, where the files say so (.cls, parquet).
        class_names: {number: name}, where the files say so (parquet).
        left_out: how many files of each kind are not taken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pictures: dict[str, int] = {}
        self.folders: set[str] = set()
        self.texts: dict[str, bytes] = {}
        self.numbers: dict[str, int] = {}
        self.class_names: dict[int, str] = {}
        self.left_out: Counter[str] = Counter()

    def stream(self, wanted: set[str]) -> Iterator[tuple[str, Payload]]:
        """Every wanted picture once, in the order that is cheapest to read."""
        raise NotImplementedError

    def _enter(self, name: str, size: int, content: Callable[[int], bytes]) -> None:
        """One file, by its kind; `content(n)` gives its first n bytes."""
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
            self.numbers[stem(name)] = self._number(name, content(HEAD))
        elif size and is_picture(content(HEAD)):
            self.pictures[name] = size
        else:
            self.left_out[shown(ending) or "without ending"] += 1

    def _number(self, name: str, text: bytes) -> int:
        try:
            return int(text)
        except ValueError as error:
            raise UserError(f"path={self.path}: {shown(name)} must hold the number of a class") from error


def stem(name: str) -> str:
    """Folder and file name up to its first dot: what the files of one sample of webdataset share."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def shown(name: str) -> str:
    """A name for messages: in one line, and in characters that every file can hold."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


# Folders --------------------------------------------------------------------------------------------------


class Folder(Files):
    """A directory tree. Whoever decodes a file reads it."""

    def __init__(self, root: Path, walk: bool = True) -> None:
        super().__init__(root)
        self.archives: dict[str, int] = {}
        if walk:
            self._walk()

    def _walk(self) -> None:
        """First all that is reached without links; then the links, in order of name, to folders that are new."""
        seen = {_identity(parent) for parent in self.path.resolve().parents}
        real, links = [""], list[str]()
        while real or links:
            folder = real.pop() if real else links.pop(0)
            try:
                identity = _identity(self.path / folder)
                entries = sorted(os.scandir(self.path / folder), key=lambda entry: entry.name)
            except OSError as error:
                raise UserError(
                    f"path={self.path}: the folder {shown(folder) or '.'} cannot be read ({error.strerror}): "
                    "mend its permissions, or move it elsewhere"
                ) from error
            if identity in seen:
                self.left_out["duplicate by link"] += 1
                continue
            seen.add(identity)
            self.folders.add(folder)
            for entry in entries:
                name = f"{folder}/{entry.name}" if folder else entry.name
                if is_hidden(entry.name):
                    self.left_out["hidden"] += 1
                elif _is_folder(entry):
                    (links if entry.is_symlink() else real).append(name)
                else:
                    self.enter_file(name)

    def enter_file(self, name: str) -> None:
        path = self.path / name
        try:
            status = path.stat()
        except OSError:  # a link to nothing; as a picture it becomes a bad file
            if name.lower().endswith(ENDINGS):
                self.pictures[name] = 0
            else:
                self.left_out["broken link"] += 1
            return
        if not stat.S_ISREG(status.st_mode):
            self.left_out["neither file nor folder"] += 1
        elif name.lower().endswith(ARCHIVES):
            self.archives[name] = status.st_size
        else:
            try:
                self._enter(name, status.st_size, lambda n: _first_bytes(path, n))
            except OSError:
                self.left_out["unreadable"] += 1

    def stream(self, wanted: set[str]) -> Iterator[tuple[str, Payload]]:
        for name in sorted(wanted):
            yield name, self.path / name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(path: Path) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino


def _first_bytes(path: Path, count: int) -> bytes:
    with open(path, "rb") as file:
        return file.read(count)


# Archives -------------------------------------------------------------------------------------------------


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


class Member(NamedTuple):
    name: str
    kind: str  # "file", "folder", or what it is left out as
    offset: int  # of its content, from the start of the tar on disk
    size: int
    content: Callable[[int], bytes]  # its first n bytes; at once, before the next member is asked for


class Tar(Files):
    """A tar archive, compressed or not."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        head = _first_bytes(path, HEAD)
        self.opener = next((opener for magic, opener in OPENERS.items() if head.startswith(magic)), None)
        self.offsets: dict[str, int] = {}
        for member in self._members():
            name = _safe(member.name, path)
            if member.kind == "folder":
                self.folders.add(name)
            elif member.kind == "file" and name not in self.pictures:
                self._enter(name, member.size, member.content)
                self.offsets[name] = member.offset
            else:
                self.left_out["a second time" if member.kind == "file" else member.kind] += 1

    def stream(self, wanted: set[str]) -> Iterator[tuple[str, Payload]]:
        if self.opener is None:
            for name in sorted(wanted, key=self.offsets.__getitem__):
                yield name, Slice(self.path, self.offsets[name], self.pictures[name])
            return
        remaining = set(wanted)
        for member in self._members():
            name = _safe(member.name, self.path)
            if member.kind == "file" and name in remaining:
                remaining.remove(name)
                too_large = member.size > MAX_BYTES
                yield name, _too_large(member.size) if too_large else member.content(member.size)
            if not remaining:
                return

    def _members(self) -> Iterator[Member]:
        with (self.opener or _open)(self.path) as file:
            yield from _members_of(file, "", 0)


def _open(path: Path) -> IO[bytes]:
    return open(path, "rb")


def _members_of(file: IO[bytes], prefix: str, start: int) -> Iterator[Member]:
    """The members of the tar that `file` holds and that begins at byte `start` of the archive, from front to back."""
    with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header) as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # type: ignore[attr-defined]  # a million of them would stay in memory
            name, offset = prefix + member.name, start + member.offset_data
            regular = member.isreg() and not member.sparse
            if regular and name.endswith(".tar"):
                inner = archive.extractfile(member)
                assert inner is not None
                yield from _members_of(inner, name.removesuffix(".tar") + "/", offset)
                continue
            kind = "file" if regular else "folder" if member.isdir() else "link or device in an archive"

            def content(count: int, member: tarfile.TarInfo = member) -> bytes:
                opened = archive.extractfile(member)
                return b"" if opened is None else opened.read(count)

            yield Member(name, kind, offset, member.size, content)
    while block := file.read(1 << 20):  # to the end, where the checksum of a compressed file stands
        if block.count(0) != len(block):
            raise tarfile.ReadError("data behind its end, or a damaged block before it")


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
                    continue
                if name in self.members:
                    self.left_out["a second time"] += 1
                    continue
                if info.flag_bits & 1:
                    raise UserError(f"path={path} is protected by a password: unpack it and give the folder")
                self.members[name] = info
                self._enter(name, info.file_size, lambda n, info=info: _head_of(archive, info, n))  # type: ignore[misc]

    def stream(self, wanted: set[str]) -> Iterator[tuple[str, Payload]]:
        with zipfile.ZipFile(self.path) as archive:
            for name in sorted(wanted, key=lambda name: self.members[name].header_offset):
                yield name, _member_of(archive, self.members[name])


def _head_of(archive: zipfile.ZipFile, info: zipfile.ZipInfo, count: int) -> bytes:
    with archive.open(info) as file:
        return file.read(count)


def _member_of(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Payload:
    if info.file_size > MAX_BYTES:
        return _too_large(info.file_size)
    try:
        return archive.read(info)
    except (*DAMAGE, NotImplementedError, RuntimeError) as error:
        return Unreadable(str(error))


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
        self.file = _pyarrow(path).ParquetFile(path)
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
        features = (
            json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
        )
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


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"path={path} needs pyarrow: python -m pip install -e '.[parquet]'") from error
    return pyarrow.parquet


class Archives(Files):
    """Several archives as one tree, <split>/...; the split is a word of the archive's name.

    The members of an archive that names no split lie in a folder of the archive's name.
    """

    def __init__(self, path: Path, names: list[str]) -> None:
        super().__init__(path)
        self.parts: list[tuple[str, Files]] = []
        for name in sorted(names):
            split = split_of(name)
            if split == "test":
                self.left_out["archive of a test split"] += 1
                continue
            part = open_archive(path / name)
            base = stem(name).rpartition("/")[2]
            self._add(f"{split}/{base}/" if split and part.numbers else f"{split or base}/", part)

    def _add(self, prefix: str, part: Files) -> None:
        for name, size in part.pictures.items():
            if prefix + name in self.pictures:
                raise UserError(
                    f"path={self.path}: two archives hold {shown(prefix + name)}: keep one of them"
                )
            self.pictures[prefix + name] = size
        self.folders |= {prefix + folder for folder in part.folders}
        self.texts |= {prefix + name: text for name, text in part.texts.items()}
        self.numbers |= {prefix + name: number for name, number in part.numbers.items()}
        self.left_out += part.left_out
        self.class_names |= part.class_names
        part.numbers = {}
        self.parts.append((prefix, part))

    def stream(self, wanted: set[str]) -> Iterator[tuple[str, Payload]]:
        for prefix, part in self.parts:
            inside = {name for name in part.pictures if prefix + name in wanted}
            if inside:
                yield from ((prefix + name, payload) for name, payload in part.stream(inside))


def split_of(name: str) -> str:
    """The split that a word of an archive's name names; "" without one."""
    words = re.split(r"[^a-z]+", name.rpartition("/")[2].lower())
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "")


# Opening --------------------------------------------------------------------------------------------------


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
    files = Archives(folder.path, list(folder.archives))
    files.texts |= folder.texts
    files.left_out += folder.left_out
    return files


def open_archive(path: Path) -> Files:
    """The archive, by its content; UserError if it is not whole."""
    try:
        head = _first_bytes(path, HEAD)
        if is_picture(head):
            raise UserError(f"path={path} is one picture: give the folder or the archive of all of them")
        kind = Zip if head.startswith((b"PK\3\4", b"PK\5\6")) else Parquet if head[:4] == b"PAR1" else Tar
        return kind(path)
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
    sizes = dict(
        sorted((folder.pictures | folder.archives | {k: len(v) for k, v in folder.texts.items()}).items())
    )
    contents = hashlib.sha256()
    for name in list(sizes)[:: max(len(sizes) // SAMPLES, 1)]:
        try:
            with open(folder.path / name, "rb") as file:
                contents.update(file.read(SAMPLE_BYTES))
                file.seek(max(sizes[name] - SAMPLE_BYTES, 0))
                contents.update(file.read(SAMPLE_BYTES))
        except OSError:
            contents.update(b"unreadable")
    return {
        "place": shown(str(folder.path.resolve())),
        "files": len(sizes),
        "names": _hash(list(sizes)),
        "sizes": _hash(list(sizes.values())),
        "contents": contents.hexdigest(),
    }


def _hash(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
