"""Running task graphs on threads or worker processes: the only importer of dask and distributed."""

from pipeline.executors.library import dask_settings  # first, because it imports dask

# isort: split
from pipeline.executors.graph import Executor, Key, Node, add_sum
from pipeline.executors.threads import ThreadExecutor
