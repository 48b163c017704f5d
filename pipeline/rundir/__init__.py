"""The run directory: paths, lock, journal, manifest, resume position."""

from pipeline.rundir.journal import Journal, JournalState, standing
from pipeline.rundir.lock import RunLock, running_owner
from pipeline.rundir.manifest import (
    OtherFormatError,
    begun_manifest,
    canvas_space,
    content_kind,
    read_manifest,
    trusted_manifest,
    write_manifest,
)
from pipeline.rundir.open import (
    Identity,
    content_alpha,
    identity,
    lost_its_stages,
    newest_canvas,
    newest_moments,
    now,
    open_run,
    refuse_changes,
    refuse_other_stages,
    refuse_unknown_stage,
    stage_path,
)
from pipeline.rundir.paths import (
    SECOND_NAME,
    journal_path,
    links_in_store,
    manifest_path,
    refuse_links,
    refuse_links_at_top,
    refuse_missing_folder,
    refuse_own_state,
    store_path,
)
from pipeline.rundir.position import Position, checked_position, position_of
from pipeline.rundir.preflight import output_colors, plan_on, with_initial_size, with_working_space
from pipeline.rundir.records import (
    Begun,
    CanvasLost,
    Exported,
    Exporting,
    Iteration,
    Manifest,
    Record,
    RolledBack,
    StageDone,
    StagePrepared,
    as_json,
)
from pipeline.rundir.results import is_as_written, refuse_foreign, written_picture
from pipeline.rundir.run_folder import locked_folder
from pipeline.rundir.space import check_space
