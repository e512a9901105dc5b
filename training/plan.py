"""From what was typed to the runs to do. Standard library and tables only."""

from dataclasses import asdict, replace

from data_sets import DataSet
from training.recipes import LOSS_DEFAULTS, RECIPE_FIELDS, recipe_of, temps_of
from training.runs import RunConfig, RunName


def name_of(options) -> RunName:
    """The run that the options of either script name; with several temperatures or losses, the first."""
    loss = (options.loss or ("kd",))[0]
    kd = {"loss": loss, "temp": (options.temp or temps_of(options.dataset, loss))[0]} if options.kd else {}
    role = "teacher" if options.tto else "student"
    images = (options.student_images or (None,))[0]
    as_typed = {f: getattr(options, f) for f in ("dataset", "seed", "subset", "holdout", "student", "size")}
    return RunName(role=role, **kd, **as_typed, omit=options.omit or (), student_images=images)


def plan(options, data: DataSet, precision: str, processes: int) -> list[RunConfig]:
    """The runs that the options of train.py ask for: one, or with --all the teacher, then the students of each seed."""
    first = name_of(options)
    names, losses = [first], options.loss or ("kd",)
    if options.all:
        names = [] if options.teacher else [first.teacher_name]
        matched = [f"kd_as_{loss}" for loss in losses if options.matched and LOSS_DEFAULTS[loss].function != "kd"]
        temps = {loss: options.temp or temps_of(options.dataset, loss) for loss in (*losses, *matched)}
        for seed in range(first.seed, first.seed + options.seeds):
            for images in options.student_images or (None,):
                student = replace(first, seed=seed, student_images=images)
                names += [student, *(replace(student, loss=loss, temp=temp) for loss in temps for temp in temps[loss])]
    return [resolve(name, options, data, precision, processes) for name in names]


def resolve(name: RunName, options, data: DataSet, precision: str, processes: int) -> RunConfig:
    """One run of the plan: the recipe's values where nothing was typed."""
    recipe = asdict(recipe_of(name.dataset, name.role, options.optimizer, data.train_images, name.student_images))
    if not (options.all and name.role == "teacher"):  # with --all these options are the students'
        recipe |= {f: getattr(options, f) for f in RECIPE_FIELDS if getattr(options, f) is not None}
    recipe["views"] = recipe["views"] or data.views
    kd_weights, ce_weight = (), 1.0
    if name.kd:
        kd_weights = options.kd_weight or LOSS_DEFAULTS[name.loss].kd_weights
        ce_weight = LOSS_DEFAULTS[name.loss].ce_weight if options.ce_weight is None else options.ce_weight
    values = {f: getattr(options, f) for f in ("optimizer", "compile", "deterministic")}
    values |= {"num_classes": len(data.classes), "images": data.fingerprint, "flip": data.flip, "precision": precision}
    values |= {"kd_weights": kd_weights, "ce_weight": ce_weight, "processes": processes}
    return RunConfig(**asdict(name), **recipe, **values, sync_bn=options.sync_bn and processes > 1)
