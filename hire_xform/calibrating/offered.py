"""Which predictors a site may choose from: those for what is to be certified, or those for approximations."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from hire_xform.config import Config
from hire_xform.lowering.predict.predictors import Predictor


@dataclasses.dataclass(frozen=True)
class Offered:
    """What sites are measured with where the settings that hold for them state no predictor.

    Attributes:
      plain: of sites that are approximated, at least one.
      certified: of sites whose settings certify them, at least one.
    """

    plain: tuple[Predictor, ...]
    certified: tuple[Predictor, ...]

    def of(self, settings: Any) -> tuple[Predictor, ...]:
        """Those of sites with these settings."""
        if settings.predictor is not None:
            return (settings.predictor,)
        return self.certified if settings.certify else self.plain

    @property
    def in_words(self) -> str:
        """For messages, and to be compared."""
        if self.plain == self.certified:
            return repr(list(self.plain))
        return f"{list(self.plain)}, {list(self.certified)} where certified"

    def stated_in(self, config: Config) -> Iterator[Config]:
        """The settings, with one predictor after the other stated wherever they have none.

        Where there are fewer for some sites than for others, these have their last one again.
        """
        for number in range(max(len(self.plain), len(self.certified))):
            rules = tuple(self._both(rule, number) for rule in config.rules)
            yield dataclasses.replace(self._both(config, number), rules=rules)

    def _both(self, owner: Any, number: int) -> Any:
        def stated(settings: Any) -> Any:
            if settings is None or settings.predictor is not None:
                return settings
            predictor = self.of(settings)[: number + 1][-1]
            # Only vocabularies are read in stages: of a predictor that has several, others have the first.
            return dataclasses.replace(
                settings, predictor=predictor if settings is owner.vocab else predictor.stages[0]
            )

        return dataclasses.replace(owner, vocab=stated(owner.vocab), ffn=stated(owner.ffn))
