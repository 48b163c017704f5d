"""The configuration: its fields, its YAML reader and its error messages."""

from pipeline.config.apply import (
    AnyConfig,
    ApplyConfig,
    ApplyNetwork,
    apply_config_of_line,
    is_apply_file,
    load_apply_config,
)
from pipeline.config.config import Config, differing_keys, input_files, is_default, load_config, result_fields
from pipeline.config.export_section import changed_export
from pipeline.config.fields import MAX_BYTES, MAX_CHUNK_PX, MAX_ITERATIONS, MAX_SIDE_PX, MAX_STYLES, MAX_THREADS
from pipeline.config.messages import faults_in, field_at
from pipeline.config.one_line import OneLine, config_and_text, variation_text
from pipeline.config.output_sections import EdgeConfig, ExportConfig
from pipeline.config.overrides import listed
from pipeline.config.regions import regions_of
from pipeline.config.sections import (
    ADDED_LATER,
    ComputeConfig,
    InitNetwork,
    InitWct,
    LimitsConfig,
    OptimizerConfig,
    PrintSize,
    StageConfig,
    StoreConfig,
    StyleConfig,
)
from pipeline.config.training import TrainConfig, load_train_config
from pipeline.config.yaml_reader import MAX_PROBLEMS, Key, Place, Problem, dotted, problem_lines, undotted
