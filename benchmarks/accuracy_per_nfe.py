"""How accurate each sampler is per network call: ours and the peers' on exactly known ODEs, in one run.

Error: the root mean square, over samples and dimensions, of the distance between the sample and the ODE's solution
from the same noise (geometric mean over the mixtures). Near the border of two modes a small error sends a sample to
the other one, and below about .03 one such sample can be most of the figure: `--measure median` looks past them. The
problems, the truth and the peers' grids: `problems.py`;
the peers: `peers/`. Calls are counted at the network, and a run that makes more than the budget does not count.

(a) the best of each library over a declared list of solvers x grids, on the tuning mixtures
(b) what each library does by default, on held-out mixtures
(c) the same method on the same levels, ours and theirs
(d) what diffusers' integer timesteps cost

Usage: python benchmarks/accuracy_per_nfe.py [--quick] [--dims 2,64] [--families edm,vp,flow] [--tables abcd]
A run with --json FILE keeps every figure; --against FILE then runs ours alone, next to the peers' kept (a) and (b).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any

import peers
import torch
from peers import on_azula, on_diffusers, on_flow_matching, on_k_diffusion
from torch import Tensor

import fluvial as fl
from problems import FAMILIES, Problem, karras, level_grids, problems

TUNING_SEED, HELD_OUT_SEED = 1, 2
BUDGETS = (4, 6, 8, 10, 16, 32)

# What is ours: (label, what fl.sample takes as solver, what it takes as times), for every family.
_GRIDS: dict[str, Any] = {f"flow, shift {shift:g}": fl.grids.Flow(shift) for shift in (0.5, 0.7, 1.0, 1.4, 2.0)}
_GRIDS |= {"uniform": "uniform", "cosine": "cosine", "karras": "karras", "exponential .1": fl.grids.Exponential(0.1)}
_GRIDS["shifted .5"] = fl.grids.Shifted(0.5)
_SOLVERS: dict[str, Any] = {
    "vab 2": fl.solvers.named("vab"),
    "vab 3": fl.solvers.named("vab", steps=3),
    "vabm 2": fl.solvers.named("vabm", steps=2),
    "vabm 3": "vabm",
    "flow ab 2": fl.solvers.Adams("flow", "plain", steps=2),
    "flow ab 3": fl.solvers.Adams("flow", "plain", steps=3),
    "flow abm 2": fl.solvers.Adams("flow", "plain", steps=2, correct=True),
    "flow abm 3": fl.solvers.Adams("flow", "plain", steps=3, correct=True),
    "unipc 2": fl.solvers.named("unipc", rule="exact"),
    "unipc 3": fl.solvers.named("unipc", steps=3),
    "noise ab 3": fl.solvers.Adams("noise", "log_snr", steps=3),
    "ipndm": "ipndm",
    "dpmpp_2m": "dpmpp_2m",
    "midpoint along rectified": fl.solvers.Midpoint(along=fl.paths.Rectified()),
    "heun along rectified": fl.solvers.Heun(along=fl.paths.Rectified()),
    "rk4 along rectified": fl.solvers.RK4(along=fl.paths.Rectified()),
}
OURS = [(f"{solver}, {grid}", _SOLVERS[solver], _GRIDS[grid]) for solver in _SOLVERS for grid in _GRIDS]

# Table (c): our solver and its options, and the peers' methods of that name. Euler and Heun depend on the clock they
# step in: on a flow it is t, for both sides; on EDM it is sigma, for which our path is EDM(rho=1).
SAME = [
    ("euler", {}, ["diffusers flow euler", "flow_matching euler to 1", "edm: k-diffusion euler"]),
    ("ddim", {}, ["diffusers ddim", "azula ddim to 0"]),
    ("heun", {}, ["diffusers flow heun", "edm: diffusers heun", "edm: k-diffusion heun"]),
    ("dpmpp_2m", {}, ["k-diffusion dpmpp_2m", "diffusers dpmsolver++ 2"]),
    ("dpmpp_3m", {}, ["k-diffusion dpmpp_3m_sde eta 0", "diffusers dpmsolver++ 3"]),
    ("dpmpp_2s", {}, ["k-diffusion dpmpp_2s eta 0"]),
    ("unipc", {"steps": 2}, ["diffusers unipc 2 bh2"]),
    ("unipc", {"steps": 3}, ["diffusers unipc 3 bh2"]),
    ("deis", {"steps": 2, "clock": "log_snr"}, ["diffusers deis 2", "azula zEAB2 denoise"]),
    ("deis", {"steps": 3, "clock": "log_snr"}, ["diffusers deis 3", "azula zEAB3 denoise"]),
    ("ipndm", {}, ["diffusers ipndm"]),
    ("vab", {"steps": 2, "variable": "flow"}, ["azula vAB2 to 0"]),
    ("vab", {"steps": 3, "variable": "flow"}, ["azula vAB3 to 0"]),
]
SAME_GRID = {"edm": "karras/0.002", "vp": "uniform", "flow": "uniform"}

Record = dict[str, Any]


Errors = tuple[float, float]  # RMS, median
NONE: Errors = (math.inf, math.inf)


def measured(problem: Problem, nfe: int, run: Callable[[], Tensor]) -> Errors:
    """The errors of a run; infinite if it is not finite or makes more calls than the budget."""
    problem.network.calls = 0
    sample = run()
    errors = problem.error(sample), problem.median_error(sample)
    return errors if math.isfinite(errors[0]) and problem.network.calls <= nfe else NONE


def ours(problem: Problem, nfe: int, solver: Any, grid: Any) -> Errors:
    """The errors of as many steps of this solver as the budget affords."""
    model = problem.model()
    steps = next((n for n in range(nfe + 1, 0, -1) if _calls(model, solver, n, grid) <= nfe), 0)
    if steps == 0:
        return NONE
    return measured(problem, nfe, lambda: fl.sample(model, problem.noise, solver=solver, steps=steps, times=grid))


def _calls(model: fl.Model, solver: Any, steps: int, grid: Any) -> float:
    """Network calls of a run; infinite where this solver cannot make so few steps, or the grid has none such."""
    try:
        return fl.sampling.nfe(model, solver, steps, grid)
    except fl.errors.FluvialError:
        return math.inf


# One task per table, family and dimension: each returns records, and runs in a process of its own.


def best_task(problem: Problem, budgets: tuple[int, ...]) -> list[Record]:
    records = []
    for nfe in budgets:
        for label, solver, grid in OURS:
            records.append(_record(problem, "a", "fluvial", label, nfe, ours(problem, nfe, solver, grid)))
        for method in peers.methods(problem.family):
            for name, grid in level_grids(problem.family).items():
                n = method.levels(nfe)
                if n < 1 or not name.startswith(method.grids):
                    continue
                errors = measured(problem, nfe, partial(_try, method, problem, grid(problem, n)))
                records.append(_record(problem, "a", method.library, f"{method.label}, {name}", nfe, errors))
    return records


def _try(method: peers.Method, problem: Problem, levels: list[float]) -> Tensor:
    try:
        return method.run(problem, levels)
    except (IndexError, ZeroDivisionError, RuntimeError):  # fewer steps than it can make
        return torch.full_like(problem.noise, math.nan)


def _k_default(name: str, per_step: int, problem: Problem, nfe: int) -> Tensor:
    grid = {"edm": "karras/0.002", "vp": "karras table", "flow": "karras from 80/0.002"}[problem.family]
    levels = level_grids(problem.family)[grid](problem, nfe if per_step == 1 else (nfe + 1) // 2)
    return on_k_diffusion.sample(name, problem, levels)


def _edm_default(name: str, problem: Problem, nfe: int) -> Tensor:
    return on_diffusers.edm(name, problem, karras(problem, nfe))


def defaults(family: str) -> dict[str, tuple[str, Callable[[Problem, int], Tensor]]]:
    """Each library's default, as its pipelines, documents or examples have it: label -> (library, run)."""
    found: dict[str, tuple[str, Callable[[Problem, int], Tensor]]] = {}
    if family == "edm":
        for name in ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"):
            found[name] = ("diffusers", partial(_edm_default, name))
    else:
        name = "DPMSolverMultistepScheduler" if family == "vp" else "FlowMatchEulerDiscreteScheduler"
        found[name] = ("diffusers", lambda problem, nfe: on_diffusers.shipped(problem, name, nfe))
    found["dpmpp_2m, karras"] = ("k-diffusion", partial(_k_default, "sample_dpmpp_2m", 1))
    found["heun, karras"] = ("k-diffusion", partial(_k_default, "sample_heun", 2))
    found["DDIMSampler"] = ("azula", on_azula.default)
    if family != "edm":  # flow_matching has no variance-exploding path
        found["midpoint"] = ("flow_matching", on_flow_matching.default)
    return {label: entry for label, entry in found.items() if entry[0] in _here()}


def _here() -> set[str]:
    return set(peers.LIBRARIES) - set(peers.absent())


def default_task(problem: Problem, budgets: tuple[int, ...]) -> list[Record]:
    records = []
    for nfe in budgets:
        solver, grid = fl.solvers.recommended(nfe)
        records.append(_record(problem, "b", "fluvial", "recommended", nfe, ours(problem, nfe, solver, grid)))
        for label, (library, run) in defaults(problem.family).items():
            errors = measured(problem, nfe, partial(run, problem, nfe))
            records.append(_record(problem, "b", library, label, nfe, errors))
    return records


def same_task(problem: Problem, budgets: tuple[int, ...]) -> list[Record]:
    family = problem.family
    grid = level_grids(family)[SAME_GRID[family]]
    theirs = {f"{m.library} {m.label}": m for m in peers.methods(family)}
    # flow_matching's path is the flow's: elsewhere its clock is not ours.
    theirs = {k: m for k, m in theirs.items() if family == "flow" or m.library != "flow_matching"}
    records = []
    for name, options, labels in SAME:
        title = " ".join([name, *map(str, options.values())])
        labels = [label.removeprefix("edm: ") for label in labels if family == "edm" or not label.startswith("edm: ")]
        present = [label for label in labels if label in theirs]
        for nfe in budgets if present else ():
            levels = grid(problem, theirs[present[0]].levels(nfe))
            if name in fl.solvers.names():
                errors = _ours_on(problem, fl.solvers.named(name, **options), levels)
                records.append(_record(problem, "c", title, "fluvial", nfe, errors))
            for label in present:
                errors = measured(problem, nfe, partial(_try, theirs[label], problem, levels))
                records.append(_record(problem, "c", title, label, nfe, errors))
    return records


def _ours_on(problem: Problem, solver: Any, levels: list[float]) -> Errors:
    """Our errors on these levels, however many calls that takes."""
    problem = copy.copy(problem)
    if problem.family == "edm":
        problem.path = fl.paths.EDM(rho=1.0)
    times = [min(problem.time(level), math.nextafter(1.0, 0.0)) for level in levels] + [1.0]
    sample = partial(fl.sample, problem.model(), problem.noise, solver=solver, times=times)
    return measured(problem, 10**9, sample)


def rounding_task(problem: Problem, budgets: tuple[int, ...]) -> list[Record]:
    if problem.family == "edm" or "diffusers" not in _here():
        return []  # the EDM schedulers have no integer timesteps
    records = []
    option = {} if problem.family == "flow" else {"use_karras_sigmas": True}
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler"):
        for nfe in (*budgets, 100, 400):
            for label, exact in (("as shipped", False), ("exact levels", True)):
                errors = measured(problem, nfe, partial(on_diffusers.shipped, problem, name, nfe, exact, **option))
                records.append(_record(problem, "d", name, label, nfe, errors))
    return records


TASKS = {"a": best_task, "b": default_task, "c": same_task, "d": rounding_task}


def _record(problem: Problem, table: str, library: str, label: str, nfe: int, errors: Errors) -> Record:
    place = {"table": table, "family": problem.family, "dim": problem.noise.shape[1], "nfe": nfe}
    return {**place, "library": library, "label": label, "rms": errors[0], "median": errors[1]}


def _in_process(table: str, problem: Problem, budgets: tuple[int, ...]) -> list[Record]:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    with torch.no_grad():
        return TASKS[table](problem, budgets)


def _averaged(records: list[Record]) -> list[Record]:
    """One record for each configuration, with the geometric means over the mixtures."""
    groups: dict[tuple, list[Record]] = defaultdict(list)
    for r in records:
        groups[tuple((k, v) for k, v in r.items() if k not in ("rms", "median"))].append(r)
    averaged = []
    for key, group in groups.items():
        means = {k: math.exp(sum(math.log(max(r[k], 1e-12)) for r in group) / len(group)) for k in ("rms", "median")}
        averaged.append({**dict(key), **means})
    return averaged


# What is printed.


def print_best(records: list[Record], budgets: tuple[int, ...]) -> None:
    """Table (a), and which configuration won each cell."""
    names = ["fluvial", *dict.fromkeys(r["library"] for r in records if r["library"] != "fluvial")]
    for family, dim in dict.fromkeys((r["family"], r["dim"]) for r in records):
        best: dict[tuple[str, int], Record] = {}
        for r in records:
            key = (r["library"], r["nfe"])
            if (r["family"], r["dim"]) == (family, dim) and r["error"] < best.get(key, {"error": math.inf})["error"]:
                best[key] = r
        rows = {name: [best.get((name, n), {"error": math.inf})["error"] for n in budgets] for name in names}
        rows["best peer"] = [min((rows[name][k] for name in names[1:]), default=math.inf) for k in range(len(budgets))]
        rows["ours / best peer"] = [rows["fluvial"][k] / rows["best peer"][k] for k in range(len(budgets))]
        _print_rows(f"(a) best of each library: {family}, dimension {dim}", rows, budgets)
        for name in names:
            for n in budgets:
                if (name, n) in best:
                    print(f"      {name:>16} {n:>3}  {best[name, n]['label']}")


def print_rows_of(records: list[Record], title: str) -> None:
    """Tables (b), (c), (d): a row for each label."""
    for family, dim in dict.fromkeys((r["family"], r["dim"]) for r in records):
        here = [r for r in records if (r["family"], r["dim"]) == (family, dim)]
        columns = sorted({r["nfe"] for r in here})
        rows: dict[str, list[float]] = {}
        for r in here:
            row = rows.setdefault(f"{r['library']}: {r['label']}", [math.inf] * len(columns))
            row[columns.index(r["nfe"])] = r["error"]
        _print_rows(f"{title}: {family}, dimension {dim}", rows, tuple(columns))


def _print_rows(title: str, rows: dict[str, list[float]], columns: tuple[int, ...]) -> None:
    width = max(map(len, rows))
    print(f"\n{title}\n{'calls':>{width}} " + " ".join(f"{n:>8}" for n in columns))
    for name, values in rows.items():
        print(f"{name:>{width}} " + " ".join(f"{v:8.2g}" if math.isfinite(v) else f"{'-':>8}" for v in values))


def _theirs(file: str, settings: dict[str, Any], places: set[tuple]) -> list[Record]:
    """The peers' records of an earlier run on the same problems."""
    with open(file, encoding="utf-8") as opened:
        earlier = json.load(opened)
    if any(earlier[key] != value for key, value in settings.items()):
        raise SystemExit(f"{file} was made with other settings than {settings}: on other problems")
    here = [r for r in earlier["records"] if (r["table"], r["family"], r["dim"], r["nfe"]) in places]
    return [r for r in here if r["library"] != "fluvial"]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", default="2,64")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--nfe", default=",".join(map(str, BUDGETS)))
    parser.add_argument("--mixtures", type=int, default=1, help="mixtures for each of tuning and held out")
    parser.add_argument("--threads", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--tables", default="abcd")
    parser.add_argument("--quick", action="store_true", help="one mixture, 128 noises, four budgets")
    parser.add_argument("--measure", choices=("rms", "median"), default="rms", help="over the samples")
    parser.add_argument("--json", metavar="FILE", help="keep every configuration's errors")
    parser.add_argument("--against", metavar="FILE", help="the peers' figures from such a file")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    budgets = (4, 8, 16, 32) if given.quick else tuple(int(n) for n in given.nfe.split(","))
    for library, reason in peers.absent().items():
        print(f"{library} is absent and left out: {reason}")
    families, jobs = tuple(given.families.split(",")), []
    for dim in (int(d) for d in given.dims.split(",")):
        for seed, tables in ((TUNING_SEED, "acd"), (HELD_OUT_SEED, "b")):
            wanted = [table for table in tables if table in given.tables]
            if wanted:
                count, samples = (1, 128) if given.quick else (given.mixtures, None)
                made = problems(dim, families, count, seed, samples)
                jobs += [(table, problem, budgets) for table in wanted for problem in made]
    alone = peers.leave_out if given.against else None
    with ProcessPoolExecutor(given.threads, get_context("spawn"), initializer=alone) as pool:
        found = _averaged([r for records in pool.map(_in_process, *zip(*jobs)) for r in records])
    settings = {"mixtures": given.mixtures, "quick": given.quick}
    if given.against:
        found += _theirs(given.against, settings, {(r["table"], r["family"], r["dim"], r["nfe"]) for r in found})
    if given.json:
        kept = [r for r in found if math.isfinite(r["rms"])]
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump({**settings, "records": kept}, file, indent=0)
    found = [{**r, "error": r[given.measure]} for r in found]
    tables = {table: [r for r in found if r["table"] == table] for table in TASKS}
    print_best(tables["a"], budgets)
    print_rows_of(tables["b"], "(b) defaults, on held-out mixtures")
    print_rows_of(tables["c"], "(c) the same method on the same levels")
    print_rows_of(tables["d"], "(d) integer timesteps")


if __name__ == "__main__":
    main()
