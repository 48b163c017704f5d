"""Running task graphs on threads or worker processes: the only importer of dask and distributed."""
