"""The plan of a run: its work, memory and disk, computed before it starts."""

from pipeline.plan.device import STAGING_THREADS, Device, resolve_device, run_device, tile_threads
from pipeline.plan.duration import Speed, export_s, slowness
from pipeline.plan.memory import BASE_BYTES, StageWork
from pipeline.plan.network_cost import LayerUse, layers_in_use
from pipeline.plan.plan import Plan, StagePlan, arrays_of, make_plan, plan_stage, with_added_stages
from pipeline.plan.print_sheets import Sheet, has_edges, sheets_of, whole_of
from pipeline.plan.processes import WORKERS, most_ahead, update_processes, update_threads, update_values
from pipeline.plan.residency import CHUNKS_PER_KERNEL
from pipeline.plan.sizes import fit, fitting_scales, initial_px, long_sides, with_size_in_px
