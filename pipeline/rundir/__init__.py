"""The run directory: paths, lock, journal, manifest, resume position."""

from pipeline.rundir.journal import FollowedJournal, Journal, JournalState, standing
from pipeline.rundir.lock import RunLock, refuse_locked, running_owner
from pipeline.rundir.manifest import (
    OtherFormatError,
    begun_manifest,
    canvas_space,
    content_kind,
    manifest_inputs,
    max_iterations,
    read_manifest,
    stages_of,
    trusted_manifest,
    write_manifest,
)
from pipeline.rundir.notes import export_notes, sheet_notes
from pipeline.rundir.open import (
    Identity,
    RunState,
    check_run,
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
    named_inputs,
    refuse_inputs,
    refuse_links,
    refuse_links_at_top,
    refuse_missing_folder,
    refuse_own_state,
    store_path,
)
from pipeline.rundir.position import Position, checked_position, position_of
from pipeline.rundir.preflight import output_colors, plan_on, resolved, with_initial_size
from pipeline.rundir.provenance import output_metadata
from pipeline.rundir.records import (
    Begun,
    CanvasLost,
    Cleaned,
    Exported,
    Exporting,
    Iteration,
    Manifest,
    Pass,
    Record,
    RolledBack,
    StageAdded,
    StageDone,
    StagePrepared,
    StageSizes,
    as_json,
    iterations_of,
    steps_of,
)
from pipeline.rundir.results import Pictures, is_as_written, is_one_of, refuse_foreign, written_picture
from pipeline.rundir.run_folder import check_work_dir, locked_folder, refuse_misplaced
from pipeline.rundir.space import check_space, state_bytes
