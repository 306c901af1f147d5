"""``calibrate``: runs a function on real inputs, measures every site, and chooses predictors and sizes."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hire_xform.api import check_function
from hire_xform.calibrating.checkpoint import Kept
from hire_xform.calibrating.choose import chosen_for_cost
from hire_xform.calibrating.measuring import Calibrator
from hire_xform.calibrating.offered import Offered
from hire_xform.calibrating.progress import Shown
from hire_xform.calibrating.rehearsing import Rehearsal
from hire_xform.calibration.calibration import Calibration
from hire_xform.call.signature import Weights
from hire_xform.config import Config, Rule
from hire_xform.errors import HireWarning
from hire_xform.lowering.predict.low_rank import LowRank
from hire_xform.lowering.predict.predictors import Predictor
from hire_xform.lowering.predict.quantized import Quantized
from hire_xform.lowering.predict.staged import Staged
from hire_xform.passes.plan.settings import Settings, check_predictor

_ANY_NUMBER = 1 << 62
# Low rank in 8 bits costs a quarter of what it costs in f32 and loses little, so plain f32 factors are left out; and
# `Projected`, which reads as many bytes as `LowRank` and is hardly ever better.
PREDICTORS: tuple[Predictor, ...] = (
    Quantized(8),
    Quantized(4),
    LowRank(0.125, bits=8),
    LowRank(0.25, bits=8),
    LowRank(0.5, bits=8),
    LowRank(0.75, bits=4),
)
# Of sites that are to be certified: quantised rows have the tightest bounds, coordinates the fewest bytes. Heads
# read the tight ones of what the others leave open; blocks have the first stage alone.
CERTIFIED_PREDICTORS: tuple[Predictor, ...] = (
    Quantized(8),
    Staged((LowRank(0.5, bits=8), Quantized(8))),
    Staged((LowRank(0.5625, bits=4), Quantized(8))),
    Staged((LowRank(0.75, bits=4), Quantized(8))),
)


def calibrate(
    fun: Callable,
    batches: Iterable[Sequence[Any] | Mapping[str, Any]],
    *,
    weights_argnums: int | Sequence[int] | None = None,
    weights_argnames: str | Sequence[str] | None = None,
    recall: float | None = None,
    head_kl: float | None = 0.01,
    max_kl: float | None = None,
    max_loss_increase: float | None = None,
    loss: Callable[..., Any] | None = None,
    predictors: Sequence[Predictor] | None = None,
    config: Config | None = None,
    fitted: Calibration | None = None,
    regroup: bool = True,
    progress: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    **jit_options: Any,
) -> Calibration:
    """Runs a function on real inputs, measures every site, and chooses a predictor and sizes for each::

        calibration = hx.calibrate(decode_step, [(params, cache, token), ...], recall=0.99)
        step = hx.sparsify(decode_step, calibration=calibration)

    The function runs densely. Its results are dropped; state that it returns is not passed on, so let the batches hold
    it, or calibrate a prefill: sites are known again by their weights, in any function of the same model. Every token
    counts, padding too. Memory does not grow with the number of batches: a packed copy of each weight for each
    predictor, and sums.

    Recall is, for a vocabulary projection, the share of tokens whose dense arg max is among the candidates; for a
    feed-forward block the share of its units that are not zero that are chosen, and where units are never exactly zero,
    of its energy: the square of activation times norm of the down row. Each site gets the predictor, and the size, that
    reach it at the fewest weight bytes that one token reads; a step that is planned takes another that reaches it where
    that is predicted to be faster on the machine. Of the logits of no candidate, which are the predictor's,
    recall says nothing: so a head's softmax has to be close as well, by ``head_kl``. Layers of one loop have sizes of
    their own, in branches of the loop's body, where that saves enough; ``explain()`` says so. Units that fire for
    almost every token are always computed, and have no predictor, where that saves 2 % or more of what a block reads:
    of blocks that leave zeros, uncertified, whose units are not chosen in groups.

    A certified site gets up to three sizes, of which each input takes the smallest that will do: those with the fewest
    expected bytes, dense runs included. The largest proves that share of the tokens, and 99.9 % at least, of a head
    99.99 %; what it does not prove runs dense. Sites are measured certified where ``config`` states it, as
    ``hx.lossless()`` does, and else as approximations.

    ``max_kl`` and ``max_loss_increase`` are measured end to end: all sites sparse together, one token at a time, on
    these batches. How bytes are shared out among the sites follows from their curves; see ``choose.py``.

    Predictors are fitted to all batches, but measured on each half of them as fitted to the other half: what they do on
    text they were not fitted to.

    Weights may be over several devices, and stay there; meanwhile each device holds the predictors of all rows. Sizes
    are those of one device: a sharded site splits them.

    Args:
      fun: the function, as for ``sparsify``.
      batches: tuples of its arguments, or dictionaries of them by name, plain weights included; a list or the like,
        since it is read more than once. An
        iterator, which can be read once, will do if all predictors are ``Quantized``; groups of units are then those of
        neighbours as they are, and all units are predicted.
      weights_argnums, weights_argnames: the arguments that hold weights, as for ``sparsify``.
      recall: what the sizes are to reach, 0 < recall <= 1. Without any target 0.99.
      head_kl: with a recall, the largest mean KL divergence, in nats a token, of the softmax of a head's sparse logits
        from that of the dense ones; with ``fill="-inf"``, where that is infinite, of the dense ones from the sparse:
        minus the logarithm of the mass that the candidates hold. None allows any, for greedy decoding, which reads the
        arg max only. Not for certified heads. Where no predictor measured is within it, recall alone decides, and a
        warning says so.
      max_kl: instead, the mean KL divergence, in nats a token, of the softmax of the sparse logits from that of the
        dense ones, as the vocabulary projection returns them; of several projections the largest. Both runs see the
        same arguments. For ``fill="predicted"``.
      max_loss_increase: instead, the mean over batches of the loss of the sparse function less that of the dense one.
      loss: for that, the loss, a number, made of ``fun``'s result and the batch: ``loss(result, *batch)``, or
        ``**batch``. None is for
        functions that return it.
      predictors: what each site may choose from, where ``config`` states no predictor; None is ``PREDICTORS``, and
        ``CERTIFIED_PREDICTORS`` for a site that is to be certified.
      config: what is to be calibrated; give ``sparsify`` the same. None is ``Config()``.
      fitted: a calibration of this function: predictors are fitted to the inputs that it saw, and units grouped as it
        has them, instead of by these batches. So what was calibrated on one text is measured on another.
      regroup: where units are chosen in groups, make neighbours of units that fire together. False leaves groups as
        they are: for models that were trained with theirs.
      progress: show a progress bar; None shows one on a terminal.
      checkpoint: a file that what was measured is kept in meanwhile. Where a call is interrupted, one with the same
        function, batches, weights and settings goes on from it; the target may be another. It is removed at the end.
      **jit_options: options of ``jax.jit``, as for ``sparsify``.

    Raises:
      TypeError, ValueError: an argument is not usable, there are no batches or no sites, or inputs of a site are NaN or
        infinite; the message names what it is.
    """
    config = check_function("calibrate", fun, config, jit_options)
    name, value = _checked_target(recall=recall, max_kl=max_kl, max_loss_increase=max_loss_increase)
    if loss is not None and (name != "max_loss_increase" or not callable(loss)):
        raise TypeError(f"calibrate: loss={loss!r}; expected a function, and max_loss_increase with it")
    if name == "max_kl" and any(s.fill == "-inf" for s in _all_settings(config)):
        raise ValueError('calibrate: max_kl with fill="-inf", of which the KL divergence is infinite')
    if head_kl is not None:
        _checked_positive("head_kl", head_kl)
    if progress is not None and not isinstance(progress, bool):
        raise TypeError(f"calibrate: progress={progress!r}; expected True, False or None")
    if name != "recall" and any(s.certify for s in _all_settings(config)):
        raise ValueError(f"calibrate: {name} with certify=True, which loses nothing; expected recall, or no target")
    tried = _checked_predictors(predictors)
    if not isinstance(batches, Iterable) or isinstance(batches, (Mapping, str, np.ndarray, jax.Array)):
        raise TypeError(f"calibrate: batches is a {type(batches).__name__}; expected an iterable of argument tuples")
    if not isinstance(regroup, bool):
        raise TypeError(f"calibrate: regroup={regroup!r}; expected True or False")
    if fitted is not None and not isinstance(fitted, Calibration):
        raise TypeError(f"calibrate: fitted={fitted!r}; expected what hx.calibrate returns, or None")
    asked = [p for s in _all_settings(config) for p in tried.of(s) if p.takes_inputs]
    fits = fitted is None and bool(asked)
    grouped = regroup and any(s.group_size > 1 for s in _all_settings(config))
    if name != "recall" and iter(batches) is batches:
        raise ValueError(
            f"calibrate: batches is a {type(batches).__name__}, which can be read once; {name} takes several passes; "
            "expected a list, or the like"
        )
    if fits and iter(batches) is batches:
        fitting = " and ".join(sorted({type(p).__name__ for p in asked}))
        raise ValueError(
            f"calibrate: batches is a {type(batches).__name__}, which can be read once, but {fitting} are "
            "fitted in a first pass and measured in a second; expected a list, or the like, or "
            "predictors=[hx.Quantized(8)]"
        )
    often = name == "recall" and any(
        ffn is not None and not ffn.certify for ffn in (config.ffn, *(rule.ffn for rule in config.rules))
    )
    first = fits or (fitted is None and (grouped or often) and iter(batches) is not batches)
    with contextlib.ExitStack() as stack:
        kept = None
        if checkpoint is not None:
            kept = stack.enter_context(Kept(checkpoint, _made_of(fun, config, tried, fitted, regroup, first)))
        shown = stack.enter_context(Shown(sys.stderr.isatty() if progress is None else progress))
        measuring = Calibrator(fun, Weights(weights_argnums, weights_argnames), jit_options, shown, kept)
        known: Sequence[Calibration | None] = (fitted,) * 3
        if first:
            known = measuring.inputs(batches, _everywhere(config, _unfitted))
        if not regroup:
            known = [_as_they_are(one) for one in known]
        if not fits:
            known = (known[0],) * 3
        plain = _everywhere(config, _plainly)
        measured = measuring.predictors(batches, plain, tried, known, counted=first)
        _warn_of_few(measured)
        sites = {
            path: site.chosen_for(value, head_kl) if name == "recall" else site.chosen_for(0.99, static=False)
            for path, site in measured.sites.items()
        }
        found = Calibration(sites, f"{name} {value:g}", measured.batches)
        if name == "recall":
            _warn_beyond(found)
            return found
        if name == "max_kl" and not any(site.kind == "vocab" for site in sites.values()):
            raise ValueError("calibrate: max_kl: the function has no vocabulary projection; expected another target")
        loss = (loss or (lambda result, *args, **kwargs: result)) if name == "max_loss_increase" else None
        rehearsal = Rehearsal(measuring, plain, list(batches), loss)
        return chosen_for_cost(found, rehearsal, value, f"{name} {value:g}")


def _made_of(
    fun: Callable,
    config: Config,
    predictors: Offered,
    fitted: Calibration | None,
    regroup: bool,
    first: bool,
) -> dict[str, str]:
    """What a checkpoint is of, for messages and to be compared: all that what is measured hangs on but the batches."""
    from hire_xform import __version__  # which imports this module

    return {
        "function": getattr(fun, "__qualname__", type(fun).__qualname__),
        "config": repr(config),
        "predictors": predictors.in_words,
        "fitted": "None" if fitted is None else f"{fitted!r} {[s.inputs for s in fitted.sites.values()]}",
        "regroup": repr(regroup),
        "passes": "inputs and predictors" if first else "predictors",
        "versions": f"hire_xform {__version__}, JAX {jax.__version__}",
    }


def _checked_target(**targets: Any) -> tuple[str, float]:
    """The name and the value of what is asked for."""
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) > 1:
        raise TypeError(f"calibrate: {' and '.join(given)} are given; expected one of them")
    name, value = next(iter(given.items())) if given else ("recall", 0.99)
    if name == "recall":
        return name, _checked_positive(name, value, 1.0, "0 < recall <= 1")
    return name, _checked_positive(name, value)


def _checked_positive(name: str, value: Any, most: float = sys.float_info.max, bound: str = "more than 0") -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= most:
        raise ValueError(f"calibrate: {name}={value!r}; expected a number, {bound}")
    return float(value)


def _warn_of_few(measured: Calibration) -> None:
    """Warns of sites that saw one token: what is measured of it is true of that one."""
    few = [path for path, site in measured.sites.items() if site.tokens.max() == 1]
    if few:
        more = f" and {len(few) - 1} more" if len(few) > 1 else ""
        warnings.warn(
            f"calibrate: {few[0]}{more} saw 1 token, of which no size can be told; expected batches of thousands of "
            "tokens, such as prefills of real text",
            HireWarning,
            stacklevel=3,
        )


def _warn_beyond(found: Calibration) -> None:
    """Warns of heads whose logits, with every predictor measured, are further from the dense ones than was asked."""
    for site in found.sites.values():
        if site.beyond_head_kl:
            kl = float(site.kl_at(int(site.sizes.max())).max())
            warnings.warn(
                f"calibrate: {site.path} ({', '.join(site.weights)}): no predictor measured keeps the logits within "
                f"head_kl={site.head_kl:g} nats a token of the dense ones; with {site.predictor} and "
                f"{int(site.sizes.max())} candidates it is {kl:.2g}. For greedy decoding pass head_kl=None; to sample "
                'or to score give it other predictors, such as hx.Quantized(8), or fill="predicted"',
                HireWarning,
                stacklevel=3,
            )


def _checked_predictors(predictors: Any) -> Offered:
    if predictors is None:
        return Offered(PREDICTORS, CERTIFIED_PREDICTORS)
    if not isinstance(predictors, (list, tuple)) or not predictors:
        raise TypeError(f"calibrate: predictors={predictors!r}; expected a list of at least one predictor")
    for one in predictors:
        check_predictor("calibrate", one)
    once = tuple(dict.fromkeys(predictors))
    return Offered(once, once)


def _all_settings(config: Config) -> list[Settings]:
    held: list[Config | Rule] = [config, *config.rules]
    return [s for owner in held for s in (owner.vocab, owner.ffn) if s is not None]


def _everywhere(config: Config, change: Callable[[Any], Any]) -> Config:
    """The settings at every site whatever its size, each changed."""

    def changed(settings: Any) -> Any:
        return None if settings is None else change(settings)

    # Read compressed, other products would be another model than the one that is measured.
    rules = [dataclasses.replace(r, vocab=changed(r.vocab), ffn=changed(r.ffn), dense=None) for r in config.rules]
    return Config(vocab=changed(config.vocab), ffn=changed(config.ffn), rules=(Rule("*", force=True), *rules))


def _as_they_are(known: Calibration | None) -> Calibration | None:
    """A calibration without its order of units."""
    if known is None:
        return None
    sites = {path: dataclasses.replace(site, order=None, touched=None) for path, site in known.sites.items()}
    return Calibration(sites, known.target, known.batches)


def _plainly(settings: Any) -> Any:
    """As measured: of any number of tokens, and certified only where that is asked for."""
    return dataclasses.replace(settings, max_tokens=_ANY_NUMBER, certify=settings.certify or False)


def _unfitted(settings: Any) -> Any:
    """For the pass that only finds out what to fit predictors to."""
    return dataclasses.replace(_plainly(settings), certify=False, predictor=Quantized(bits=8))
