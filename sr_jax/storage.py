"""Where a run lies: a folder of a file system, or gs://BUCKET/RUN of Google Cloud Storage.

A bucket is no file system. It has names with contents, and a folder is what several names begin
with: an empty one does not exist, none is renamed in one go, and nothing is appended to. And
`pathlib` makes `gs:/` of `gs://`. So a run's path is made here, and what a bucket needs done
otherwise is done here; the path of a folder is `pathlib`'s and nothing else.

Two clients work in a bucket: tensorstore writes the arrays of checkpoints, gcsfs the rest. Few need
gcsfs, so it is an extra (`gcs`). It brings google-cloud-storage, without which Orbax cannot delete
old steps.
"""

import importlib.util
import os
import pathlib
import re
import shutil
import uuid

from etils import epath
import fsspec

Folder = pathlib.Path | epath.Path

# One client, with TensorFlow and without: what epath takes of TensorFlow cannot be tested, since it
# knows one address only. Read at the first path of a bucket.
os.environ.setdefault("EPATH_USE_TF", "false")
# gcsfs asks over gRPC whether a bucket is of a newer kind, to be faster; no such bucket was tried.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
# tensorstore and the other hosts write too: what was listed a moment ago is not what is there.
fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)


def run_folder(path: str | os.PathLike) -> Folder:
  """Makes the path of a run, which need not exist.

  Raises:
    ValueError: another place than a folder or gs://BUCKET/RUN.
    ImportError: it is in a bucket, and gcsfs is not there.
  """
  text = os.fspath(path)
  if "://" not in text and not text.startswith("gs:/"):
    return pathlib.Path(text)
  if not re.match("gs://[^/]+/+[^/]", text):
    raise ValueError(
      f"{text} must be a folder or gs://BUCKET/RUN; mount other storage and give its path"
    )
  missing = [name for name in ("gcsfs", "google.cloud.storage") if not _installed(name)]
  if missing:
    raise ImportError(f"{text} needs {missing[0]}; pip install gcsfs")
  return epath.Path(text)


def local_path(flag: str, path: str | os.PathLike) -> pathlib.Path:
  """Makes the path of what is written for people, which a bucket does not take.

  Raises:
    ValueError: it is no folder or file of a file system.
  """
  if "://" in os.fspath(path):
    raise ValueError(f"{flag}={path} must be a local path; copy it there afterwards")
  return pathlib.Path(path)


def is_bucket(folder: Folder) -> bool:
  """Whether a path is of a bucket."""
  return os.fspath(folder).startswith("gs://")


def check_access(run: Folder) -> None:
  """Does in a bucket what training does, before the hours of it; nothing for a folder.

  Raises:
    ValueError: an object cannot be written, listed or deleted there, or the bucket not described.
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
  except Exception as error:  # of four packages
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".")
    raise ValueError(
      f"--workdir={run} cannot be used: {reason}. Training writes, lists and deletes there and "
      "reads what the bucket is: it needs roles/storage.objectAdmin and "
      "roles/storage.legacyBucketReader; outside Google's machines first "
      "gcloud auth application-default login"
    ) from error
  if not found:
    raise ValueError(f"--workdir={run}: what is written there is not listed; try another bucket")


def write_text(path: Folder, text: str) -> None:
  """Writes a file whole: who reads meanwhile has the old one or the new one."""
  if is_bucket(path):
    path.write_text(text)  # appears when it is complete
    return
  temporary = path.with_suffix(".tmp")
  temporary.write_text(text)
  os.replace(temporary, path)


def move(source: Folder, target: Folder) -> None:
  """Moves a folder to where nothing is; in a bucket one object after the other."""
  if is_bucket(source):
    fsspec.filesystem("gcs").mv(os.fspath(source), os.fspath(target), recursive=True)
  else:
    target.parent.mkdir(exist_ok=True)
    shutil.move(source, target)


def _installed(name: str) -> bool:
  try:
    return importlib.util.find_spec(name) is not None
  except ModuleNotFoundError:
    return False
