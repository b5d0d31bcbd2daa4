"""A machine without TensorFlow, for programs that run in a process of their own."""

# Makes TensorFlow and what needs it impossible to find, as on a machine without.
BLOCK = """
import sys
class Without:
  def __init__(self, finder):
    self.finder = finder
  def __getattr__(self, name):
    return getattr(self.finder, name)
  def find_spec(self, name, path=None, target=None):
    if name.split(".")[0] in ("tensorflow", "tensorflow_datasets", "tensorboard"):
      return None
    return self.finder.find_spec(name, path, target)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
"""
