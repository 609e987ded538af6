"""What a grid fitted to the model gains, and what it costs: error against the ODE's solution, and the calls of the fit.

Exact mixtures in 2 and 64 dimensions as in `accuracy_per_nfe`, held-out ones; the grid is fitted on noises of its own
and judged on others. Beside it stand the recommended grid and the best of the named ones, chosen on the judged noises
themselves, which is more than a user could do. Usage: python benchmarks/fitted_grids.py [--threads 2]
"""

from __future__ import annotations

import argparse

import torch

import fluvial as fl
from problems import problems

HELD_OUT_SEED = 2
NAMED = ("uniform", "flow", "karras", "cosine", "log_snr", "exponential", "beta", "shifted")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--nfe", default="4,6,10")
    torch.set_num_threads(parser.parse_args().threads)
    budgets = [int(n) for n in parser.parse_args().nfe.split(",")]
    print(" family  dim  NFE  recommended             best named    fitted   calls of the fit")
    for dim in (2, 64):
        for problem in problems(dim, ("edm", "vp", "flow"), 1, HELD_OUT_SEED, 256):
            for nfe in budgets:
                solver, grid = fl.solvers.recommended(nfe)
                model = problem.model()

                def error(times: object, model=model, solver=solver, nfe=nfe, problem=problem) -> float:
                    return problem.error(fl.sample(model, problem.noise, solver=solver, steps=nfe, times=times))

                named = {}
                for name in NAMED:
                    try:
                        named[name] = error(name)
                    except fl.errors.OptionError:
                        continue
                best = min(named, key=lambda name: named[name])
                fitted = fl.fitting.fit_grid(model, (128, dim), solver=solver, steps=nfe, method="search", seed=1)
                print(
                    f"{problem.family:>7} {dim:>4} {nfe:>4} {error(grid):>12.4f} {named[best]:>12.4f} {best:>9} "
                    f"{error(fitted):>9.4f} {fitted.nfe:>10} x {fitted.n}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
