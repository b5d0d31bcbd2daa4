"""Makes the path of a run: a folder of a file system, or gs://BUCKET/RUN of Google Cloud Storage.

A bucket is no file system. It maps names to contents, and a folder is what several names begin
with: an empty one does not exist, none can be renamed in one go, and nothing can be appended to a
file. Also, `pathlib` turns `gs://` into `gs:/`. So the path of a run is made here, and whatever has
to be done differently in a bucket is done here; the path of a local folder is a plain `pathlib`
path.

Two clients work in a bucket: tensorstore writes the arrays of checkpoints, gcsfs the rest. Few need
gcsfs, so it is an extra (`gcs`). It brings google-cloud-storage, without which Orbax cannot delete
old steps.
"""

import importlib.util
import os
import pathlib
import re
import shutil
import tempfile
import uuid

from etils import epath
from etils.epath import gpath
import fsspec

from sr_jax import MissingPackageError, UserError
from sr_jax.machine.paths import user_path
from sr_jax.machine.writing import write_file

Folder = pathlib.Path | epath.Path


def run_folder(path: str | os.PathLike) -> Folder:
  """Makes the path of a run, which need not exist.

  Raises:
    UserError: the path is neither a folder nor gs://BUCKET/RUN.
    MissingPackageError: the run is in a bucket, and gcsfs is not installed.
  """
  text = os.fspath(path)
  if "://" not in text and not text.startswith("gs:/"):
    return user_path(text)
  if not re.match("gs://[^/]+/+[^/]", text):
    raise UserError(
      f"{text} must be a folder or gs://BUCKET/RUN; mount other storage and give its path"
    )
  missing = [name for name in ("gcsfs", "google.cloud.storage") if not installed(name)]
  if missing:
    raise MissingPackageError(f"{text} needs {missing[0]}; pip install gcsfs")
  _set_up_clients()
  return epath.Path(text)


def _set_up_clients() -> None:
  """Sets what the clients read when they meet the first path of a bucket."""
  # epath shall use the same client with TensorFlow and without. TensorFlow's own cannot be tested,
  # since it knows one address only.
  os.environ.setdefault("EPATH_USE_TF", "false")
  # epath caches whether TensorFlow is installed at its first use, which may have been for a local
  # path; clear that cache.
  getattr(getattr(gpath, "_is_tf_installed", None), "cache_clear", lambda: None)()
  # gcsfs would ask over gRPC whether a bucket is of a newer, faster kind, which was never tried.
  os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
  # tensorstore and the other hosts write too, so a listing of a moment ago may be out of date.
  fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)


def local_path(flag: str, path: str | os.PathLike) -> pathlib.Path:
  """Makes the path of an output for people, which is never written into a bucket.

  Raises:
    UserError: the path is not one of a file system.
  """
  if "://" in os.fspath(path):
    raise UserError(f"{flag}={path} must be a local path; copy it there afterwards")
  return user_path(path)


def output_folder(flag: str, path: str | os.PathLike) -> pathlib.Path:
  """Makes the path of a local folder for output, and tries whether it can be written to.

  Nothing is left there: before any work is done it is only found out whether it would be in vain.

  Raises:
    UserError: the path is not one of a file system, or nothing can be written there.
  """
  folder = local_path(flag, path)
  if not os.fspath(path).strip():
    raise UserError(f"{flag} is empty; give a folder")
  there = next(parent for parent in (folder.absolute(), *folder.absolute().parents)
               if parent.exists())  # fmt: skip
  try:
    os.rmdir(tempfile.mkdtemp(prefix=".sr_jax_", dir=there))
  except OSError as error:
    raise UserError(
      f"{flag}={path} cannot be written: {error.strerror}: {there}; give a folder that can"
    ) from error
  return folder


def is_bucket(folder: Folder) -> bool:
  """Whether a path lies in a bucket."""
  return os.fspath(folder).startswith("gs://")


def check_access(run: Folder) -> None:
  """Tries in a bucket what training will do there later; does nothing for a folder.

  Raises:
    UserError: an object cannot be written, listed or deleted there, or the bucket cannot be
      described.
  """
  if not is_bucket(run):
    return
  from google.cloud import storage as client_library

  name, _, prefix = os.fspath(run).removeprefix("gs://").partition("/")
  try:
    bucket = client_library.Client().get_bucket(name)  # as Orbax does before it deletes an old step
    probe = bucket.blob(f"{prefix}/.probe_{uuid.uuid4().hex}")
    probe.upload_from_string(b"")
    found = [blob.name for blob in bucket.list_blobs(prefix=probe.name)]
    probe.delete()
  except Exception as error:  # four packages can raise here, each with errors of its own
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
    raise UserError(
      f"--workdir={run} cannot be used: {reason}. Training writes, lists and deletes there and "
      "reads what the bucket is: it needs roles/storage.objectAdmin and "
      "roles/storage.legacyBucketReader; outside Google's machines first "
      "gcloud auth application-default login"
    ) from error
  if not found:
    raise UserError(
      f"--workdir={run}: a file written to this folder does not appear when the folder is listed; "
      "use another bucket"
    )


def check_inside(run: Folder) -> None:
  """Checks that the folders which training writes to are not links that lead out of the run's.

  Raises:
    UserError: one of them is; the error names it.
  """
  if is_bucket(run):
    return
  for name in ("checkpoints", "damaged", "preview", "psnr"):
    folder = run / name
    if folder.is_symlink() and not folder.resolve().is_relative_to(run.resolve()):
      raise UserError(
        f"{folder} is a symbolic link that leads out of the run, to {folder.resolve()}; put the "
        "folder itself there, or remove the link"
      )


def write_text(path: Folder, text: str) -> None:
  """Writes a text file as `write_bytes` does."""
  write_bytes(path, text.encode())


def write_bytes(path: Folder, contents: bytes) -> None:
  """Writes a file at once: a reader sees the old contents or the new ones, never a part."""
  if is_bucket(path):
    path.write_bytes(contents)  # appears when it is complete
    return
  write_file(path, contents)


def move(source: Folder, target: Folder) -> None:
  """Moves a folder to a place where there is nothing yet; in a bucket, object by object."""
  if is_bucket(source):
    fsspec.filesystem("gcs").mv(os.fspath(source), os.fspath(target), recursive=True)
  else:
    target.parent.mkdir(exist_ok=True)
    shutil.move(source, target)


def installed(name: str) -> bool:
  """Whether a module can be found, without importing it."""
  try:
    return importlib.util.find_spec(name) is not None
  except ModuleNotFoundError:
    return False
