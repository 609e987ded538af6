"""Guidance: a model made from a model, so that no solver ever hears of it.

Two estimates at the same state are compared, a strong one and a weak one (with and without the condition, or of two
networks), and the difference is exaggerated. One convention of scale throughout: 0 is the weak (null) estimate, 1 the
strong (conditional) one, more is extrapolation,

    out = null + scale * (cond - null).

| guidance       | is                                                                                     |
|---|---|
| `CFG`          | that line; inside an interval of noise levels only, or with its contrast taken back    |
| `APG`          | without the part of the difference that lies along the data estimate                   |
| `CFGZero`      | without the part that lies along the null's velocity, and standing still at the start  |
| `Autoguidance` | that line, with a worse network in place of the null condition                         |

At one state, two outputs differ by the difference of their data estimates times a factor (by the 2x2 solve). So plain
guidance mixes outputs of any prediction. Where a formula needs the data or the velocity, these are solved for, but only
to see directions and sizes in them: what comes back is an output in the model's own prediction. Nothing is divided by
the factor, and so nothing is lost near the data, where data estimates differ less and less. At an end of the path where
the outputs do not determine what a formula looks at (the data, from a noise prediction at alpha = 0), plain guidance is
what remains.

A guided estimate counts as one evaluation (NFE) of twice the cost. All of them are pure functions of state, time and
condition: nothing is remembered between calls.
"""

from fluvial.guidance.family import APG, CFG, Autoguidance, CFGZero
from fluvial.guidance.guided import Guided

__all__ = ["APG", "CFG", "Autoguidance", "CFGZero", "Guided"]
