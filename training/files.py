"""Where a run's files are, and whether it has finished already."""

from data_sets import DataSet
from runtime import checkpoint
from runtime.errors import UserError
from training.run import RunFiles, check_same
from training.runs import RunConfig, RunName
from training.teacher_logits import teacher_mismatch


def files_of(run: RunName, options) -> RunFiles:
    """The files of a run; the teacher of --all is shared by all --name folders."""
    if options.all and run.role == "teacher":
        return RunFiles(options.weights_path, options.plots_path, run.stem)
    return RunFiles(options.weights_folder, options.plots_folder, run.stem)


def find_finished(run: RunConfig, options, spec: DataSet) -> dict | None:
    """The checkpoint of this run if it has finished and is to be kept, else None.

    UserError if training would replace another finished run, or would have to resume another one. With --all, whose
    options are the students', any teacher that fits is kept.
    """
    files, is_shared = files_of(run, options), options.all and run.role == "teacher"
    is_unfinished = files.resume.exists() and not is_shared
    if is_unfinished and options.all:
        check_same(checkpoint.load(files.resume), run)  # now, not when its turn comes
    if is_unfinished or not (options.resume and files.checkpoint.exists()):
        return None
    content = checkpoint.load(files.checkpoint)
    if not is_shared:
        check_same(content, run)
    elif why := teacher_mismatch(content, run, spec):
        raise UserError(f"the teacher {files.checkpoint} {why}: give another --weights_path and --plots_path")
    return content
