"""The VGG network and its weights."""

from pipeline.network.weights import (
    NetworkSpec,
    WeightsSource,
    bounded_gpu_bytes,
    find_weights,
    sha256_of,
    weights_bytes,
    weights_path,
    widths_for_plan,
)
