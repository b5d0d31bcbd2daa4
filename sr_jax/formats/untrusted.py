"""Reads untrusted files: with limits, and with one error for everything that is refused."""

import contextlib
import io
import pathlib
import zipfile
from collections.abc import Iterator

from sr_jax import MissingPackageError, UserError

# The limit for the opcodes of a pickle and for the values of a tree. RRDBNet with its EMA and
# optimizer takes 113,000; an opcode of one byte makes an object of a hundred bytes.
MAX_OBJECTS = 1_000_000

SLACK = 2**20  # bytes that a small file may cost in addition


class UnsafeFileError(UserError):
  """The error of a file that asks for more than weights, or does not hold what it says."""

  def __init__(self, path: str | pathlib.Path, refused: str):
    # The reason quotes the file, so it is cut to one line without terminal escapes.
    refused = "".join(c if c.isprintable() else "?" for c in refused[:400])
    super().__init__(
      f"{path}: refused, {refused}. If it may be damaged, fetch it again; if you trust where it "
      "comes from, load it with the program that wrote it and save it again as .safetensors."
    )


@contextlib.contextmanager
def refusals(path: str | pathlib.Path) -> Iterator[None]:
  """Turns whatever a malformed file raises into UnsafeFileError; what is missing stays its own."""
  try:
    yield
  except (UnsafeFileError, FileNotFoundError, MissingPackageError):
    raise
  # Deliberately everything, MemoryError and RecursionError too: a format's reader may raise
  # nearly anything for a file that was made to break it.
  except Exception as error:
    raise UnsafeFileError(path, f"it cannot be read ({type(error).__name__}: {error})") from error


def read_bytes(path: str | pathlib.Path, most: int = -1) -> bytes:
  """Reads a file, or its first bytes, into memory, where it cannot claim what is not there.

  Raises:
    FileNotFoundError: there is no such file.
    UnsafeFileError: the path is no plain file.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise FileNotFoundError(f"there is no file {str(path)!r}")
  if not path.is_file():  # reading a device or a pipe may never end
    raise UnsafeFileError(path, "it is not a file")
  with open(path, "rb") as file:
    return file.read(most)


def read_zip(
  data: bytes, path: str | pathlib.Path, methods: tuple[int, ...], limit: int
) -> dict[str, bytes]:
  """Reads all entries of a zip archive and verifies their checksums.

  Args:
    data: the bytes of the archive.
    path: what errors call the archive.
    methods: the compression methods that are allowed. Of zipfile's, only ZIP_STORED and
      ZIP_DEFLATED stop where an entry should end.
    limit: the bytes that all entries may have together.

  Returns:
    {name: contents}, in the archive's order.

  Raises:
    UnsafeFileError: the archive breaks one of these limits, or two entries have the same name.
  """
  # An entry of the directory takes 20 times its size once zipfile has parsed it, and the number of
  # entries that the archive states cannot be trusted.
  if data.count(b"PK\x01\x02") > MAX_OBJECTS // 10:
    raise UnsafeFileError(path, f"its archive has more than {MAX_OBJECTS // 10} entries")
  with zipfile.ZipFile(io.BytesIO(data)) as archive:
    entries = archive.infolist()
    for entry in entries:
      if entry.compress_type not in methods:
        raise UnsafeFileError(path, f"its entry {entry.filename} is compressed")
    if len({entry.filename for entry in entries}) < len(entries):
      raise UnsafeFileError(path, "two entries of its archive have the same name")
    total = sum(entry.file_size for entry in entries)
    if total > limit:
      raise UnsafeFileError(
        path, f"its entries claim {total} bytes, in a file of {len(data)} bytes at most {limit}"
      )
    contents = {}
    for entry in entries:
      with archive.open(entry) as file:
        # Never without a length: zipfile then inflates up to 2 GiB before it looks at file_size.
        contents[entry.filename] = file.read(entry.file_size)
      if len(contents[entry.filename]) != entry.file_size:
        raise UnsafeFileError(path, f"its entry {entry.filename} is cut short")
    return contents
