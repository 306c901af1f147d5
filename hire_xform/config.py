"""Settings: what to rewrite, how, and where to make exceptions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hire_xform.passes.ir.debugging import path_matches
from hire_xform.passes.match.kinds import kind_named
from hire_xform.passes.plan.settings import Choice, Dense, Ffn, Vocab, refuse

__all__ = ["Config", "Dense", "Ffn", "Rule", "Vocab", "approximate", "lossless"]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An exception for the sites whose path matches, or one of whose weights has a name that does.

    ``*`` stands for any text and ``?`` for any one character; all else, brackets too, stands for itself. Later rules
    win over earlier ones.

    Raises:
      ValueError: a value is of the wrong kind; the message names it.
    """

    # Pattern for a site's path, such as "scan[0]/*", or for the name of one of its weights, such as "*mlp*"; "*" fits
    # every site.
    path_glob: str = field(kw_only=False)
    # Leave the sites dense.
    skip: bool = False
    # Rewrite them even where the cost model would leave them dense. Checks of meaning still hold.
    force: bool = False
    # Settings for vocabulary projections here; None keeps those of the Config or of an earlier rule.
    vocab: Vocab | None = None
    # Settings for feed-forward blocks here; None keeps those of the Config or of an earlier rule.
    ffn: Ffn | None = None
    # Settings for other weight products here, which are then read compressed; None keeps those of the Config or of an
    # earlier rule.
    dense: Dense | None = None

    def __post_init__(self) -> None:
        """Checks every field."""
        if not isinstance(self.path_glob, str) or not self.path_glob:
            refuse("Rule", "path_glob", self.path_glob, 'a non-empty pattern such as "*" or "scan[0]/*"')
        for name in ("skip", "force"):
            if not isinstance(getattr(self, name), bool):
                refuse("Rule", name, getattr(self, name), "True or False")
        if self.skip and self.force:
            refuse("Rule", "force", self.force, "not to be combined with skip=True")
        _check_settings("Rule", self.vocab, self.ffn, self.dense)

    def matches(self, path: str, names: Sequence[str] = ()) -> bool:
        """True when the rule applies to a site at ``path``, with weights of these names."""
        return any(path_matches(self.path_glob, text) for text in (path, *names))


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to rewrite and how.

    Raises:
      ValueError: a value is of the wrong kind; the message names it.
    """

    # Settings of vocabulary projections; None leaves them all dense.
    vocab: Vocab | None = Vocab()
    # Settings of feed-forward blocks; None leaves them all dense.
    ffn: Ffn | None = Ffn()
    # Settings of all other weight products, and of those in sites that are refused: their results are what a predictor
    # says, nothing is computed exactly. None, the default, leaves them dense.
    dense: Dense | None = None
    # Exceptions by path; later rules win.
    rules: tuple[Rule, ...] = ()

    def __post_init__(self) -> None:
        """Checks every field."""
        _check_settings("Config", self.vocab, self.ffn, self.dense)
        if isinstance(self.rules, Rule) or not isinstance(self.rules, (tuple, list)):
            refuse("Config", "rules", self.rules, "a tuple of hx.Rule")
        for rule in self.rules:
            if not isinstance(rule, Rule):
                refuse("Config", "rules", rule, "hx.Rule entries")
        object.__setattr__(self, "rules", tuple(self.rules))

    def choose(self, kind: str, path: str, names: Sequence[str] = ()) -> Choice:
        """The settings of a site.

        Args:
          kind: "ffn", "vocab", "dense", or one that is registered.
          path: its path.
          names: of its weights.
        """
        known = kind_named(kind)
        stated: Any = getattr(self, kind, None if known is None else known.settings)
        settings = stated
        reason = f"{kind}=None in the Config leaves it dense"
        force = named = skipped = False
        for rule in self.rules:
            if not rule.matches(path, names):
                continue
            if rule.skip:
                settings, force, reason = None, False, f"Rule({rule.path_glob!r}, skip=True) leaves it dense"
                skipped = True
                continue
            skipped = False
            own = getattr(rule, kind, None)
            named = named or own is not None
            settings = own if own is not None else (settings if settings is not None else stated)
            force = force or rule.force
        return Choice(settings=settings, force=force, named=named, reason=reason, final=skipped)

    @property
    def compresses(self) -> bool:
        """Whether any product outside of blocks and vocabularies may be read compressed."""
        return self.dense is not None or any(rule.dense is not None for rule in self.rules)

    def unmatched(self, texts: Sequence[str]) -> tuple[Rule, ...]:
        """The rules that match none of these paths and names; "*", meant for whatever there is, is none of them."""
        named = [rule for rule in self.rules if rule.path_glob.strip("*")]
        return tuple(rule for rule in named if not rule.matches("", texts))


def lossless(*, rules: tuple[Rule, ...] = ()) -> Config:
    """Settings under which a decode step loses nothing: the default ones, spelled out.

    What an arg max or a top-k takes of the logits is what it takes of the dense ones, and every hidden unit left out is
    zero: proved for each input. What is not proved runs dense inside the same program. See ``Vocab.certify`` and
    ``Ffn.certify``.

    Args:
      rules: exceptions by path, as for ``Config``.
    """
    return Config(vocab=Vocab(certify=True), ffn=Ffn(certify=True), rules=rules)


def approximate(*, rules: tuple[Rule, ...] = ()) -> Config:
    """Settings under which nothing is proved: 256 candidates, a quarter of the hidden units, whatever the input.

    Faster than what is proved, and nothing runs dense; how far results are from the dense ones depends on the model. A
    calibration measures that, and chooses sizes by it.

    Args:
      rules: exceptions by path, as for ``Config``.
    """
    return Config(vocab=Vocab(certify=False), ffn=Ffn(certify=False), rules=rules)


def _check_settings(owner: str, vocab: Any, ffn: Any, dense: Any) -> None:
    if vocab is not None and not isinstance(vocab, Vocab):
        refuse(owner, "vocab", vocab, "hx.Vocab(...) or None")
    if ffn is not None and not isinstance(ffn, Ffn):
        refuse(owner, "ffn", ffn, "hx.Ffn(...) or None")
    if dense is not None and not isinstance(dense, Dense):
        refuse(owner, "dense", dense, "hx.Dense(...) or None")
