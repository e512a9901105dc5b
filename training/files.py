"""Where a run's files are, and whether it has finished already."""

from data_sets import DataSet
from runtime import checkpoint
from runtime.errors import UserError
from training.run import RunFiles
from training.runs import RunConfig, RunName, describe_differences, differences, run_from
from training.teacher_logits import teacher_mismatch


def files_of(run: RunName, options) -> RunFiles:
    """The files of a run; the teacher of --all is shared by all --name folders."""
    if options.all and run.role == "teacher":
        return RunFiles(options.weights_path, options.plots_path, run.stem)
    return RunFiles(options.weights_folder, options.plots_folder, run.stem)


def has_finished(run: RunName, options) -> bool:
    """Whether a run of this name has finished and is not to be trained again; --all never does so with its teacher."""
    files = files_of(run, options)
    keep = options.resume or (options.all and run.role == "teacher")
    return keep and files.checkpoint.exists() and not files.resume.exists()


def find_finished(run: RunConfig, options, spec: DataSet) -> dict | None:
    """The checkpoint of this very run if it has finished, else None; UserError if training would replace another run.

    With --all, whose options are the students', any teacher that fits is taken.
    """
    if not has_finished(run, options):
        return None
    path = files_of(run, options).checkpoint
    content = checkpoint.load(path)
    found = run_from(content["run"])
    if options.all and run.role == "teacher":
        if why := teacher_mismatch(content, run, spec):
            raise UserError(f"the teacher {path} {why}: give another --weights_path and --plots_path")
        return content
    if differences(found, run):
        raise UserError(
            f"{path} is a finished run with {describe_differences(found, run)}: keep both with --name WORD, or replace "
            "it with --resume False"
        )
    return content
