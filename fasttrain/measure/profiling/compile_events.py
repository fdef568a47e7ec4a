"""What `torch.compile` did: where it broke a graph, and what it compiled again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from fasttrain.measure.places import Place
from fasttrain.measure.profiling.record import Recompilation
from fasttrain.step.torch_private import Compilation

__all__ = ["CompileEvents"]

MAX_REASONS = 10
OTHER_REASONS = "other reasons"


@dataclass(frozen=True, kw_only=True)
class CompileEvents:
    """What `torch.compile` did.

    Attributes:
        breaks: places of graph breaks.
        recompiled: (place of the function, reason) and how often.
    """

    breaks: list[Place]
    recompiled: Counter[tuple[Place, str]]

    @classmethod
    def of(cls, compilations: Iterable[Compilation]) -> CompileEvents:
        """Sorts compilations out: after a break, the rest of a function is compiled as one of its own."""
        known = list(compilations)
        resumed = {(each.file, each.line) for each in known if each.is_after_break}
        broken = {
            (each.file, each.line)
            for each in known
            if each.breaks and not any(file == each.file and line >= each.line for file, line in resumed)
        }
        recompiled = Counter[tuple[Place, str]]()
        for each in known:
            if each.recompile_reason is not None:
                _, _, reason = each.recompile_reason.partition(": ")
                recompiled[(each.file, each.line), " ".join(reason.split())[:200]] += 1
        return cls(breaks=sorted(resumed | broken), recompiled=recompiled)

    def recompilations(self) -> list[Recompilation]:
        """For the counters, by reason, most frequent first; the last one is of all that the list has no room for."""
        by_reason = Counter[str]()
        for (_, reason), count in self.recompiled.items():
            by_reason[reason] += count
        rows = [Recompilation(reason=reason, count=count) for reason, count in by_reason.most_common()]
        if len(rows) <= MAX_REASONS:
            return rows
        kept, left_out = rows[: MAX_REASONS - 1], rows[MAX_REASONS - 1 :]
        return [*kept, Recompilation(reason=OTHER_REASONS, count=sum(each.count for each in left_out))]
