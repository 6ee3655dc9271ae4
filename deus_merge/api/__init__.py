"""The functions for notebooks and the command line, which ``import deus_merge as dm`` has under ``dm``.

::

    import deus_merge as dm

    recipe = dm.upscale_recipe("HuggingFaceTB/SmolLM2-135M-Instruct", preset="opt_deus", insert="even")
    print(dm.plan(recipe).describe()["new_layers"])
    dm.merge(recipe, "deeper")
    dm.verify("deeper", check=True)

A plan pickles, and any process can make some of its blocks::

    plan = pickle.loads(data)
    writer = dm.ShardWriter(Path("parts"), plan.shards)  # an existing folder; resume=True where the files are there
    dm.run_blocks(plan, [0, 1, 2], writer, device="cpu")
    writer.sync(shard.filename for shard in plan.shards)
    writer.close()
"""

from __future__ import annotations

from ..checkpoint.shards import ShardWriter
from ..checkpoint.storage import LoadOptions
from ..core.errors import DeusMergeError
from ..plan.fit import Fit
from ..plan.pieces import Piece, pieces
from ..plan.training_memory import TrainingSettings
from ..plan.types import Plan
from ..recipe.types import Recipe
from ..run.block_runner import run_blocks
from ..run.pieces import Share
from ..run.preflight import RunOptions
from ..run.strip import Stripped
from ..training.calibration import Calibrated, CalibrationOptions
from ..training.calibration.scores import GapScore
from ..training.comparison import Budget, CompareOptions, Comparison
from ..verify import Verification
from .checking import inspect, methods, report, verify
from .merging import fit, merge, plan, preflight, strip, upscale, upscale_recipe
from .progress import Progress
from .results import Catalog, Inspection, MergeResult
from .training import calibrate, compare, export_training, score_gaps
from .workers import finish, make_share

__all__ = [
    "Budget",
    "Calibrated",
    "CalibrationOptions",
    "Catalog",
    "CompareOptions",
    "Comparison",
    "DeusMergeError",
    "Fit",
    "GapScore",
    "Inspection",
    "LoadOptions",
    "MergeResult",
    "Piece",
    "Plan",
    "Progress",
    "Recipe",
    "RunOptions",
    "Share",
    "ShardWriter",
    "Stripped",
    "TrainingSettings",
    "Verification",
    "calibrate",
    "compare",
    "export_training",
    "finish",
    "fit",
    "inspect",
    "make_share",
    "merge",
    "methods",
    "pieces",
    "plan",
    "preflight",
    "report",
    "run_blocks",
    "score_gaps",
    "strip",
    "upscale",
    "upscale_recipe",
    "verify",
]
