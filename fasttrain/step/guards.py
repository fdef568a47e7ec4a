"""What a traced step depends on besides its inputs, and the check before every step that it has not changed.

This module guards the optimizer, its parameter groups and state, the gradients and the metrics. Dynamo guards the
Python values that forward reads (see `capture`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from operator import is_
from typing import Any

from torch import Tensor, get_default_dtype, is_grad_enabled, strided

from fasttrain.step.capture import Capture
from fasttrain.step.optimizer import GroupOptions, code_of
from fasttrain.step.spec import StepSpec
from fasttrain.step.torch_private import (
    NO_GRADIENT_HOOKS,
    has_own_step,
    optimizer_hooks,
    scaler_tensors,
)

__all__ = ["Guards"]

PLAIN = (bool, int, float, str, bytes, type(None))
"""Values that compare by what they are."""


class Guards:
    """What a traced step takes for granted besides its tensors' shapes and types and the batch's layout.

    The check runs before every step, so all facts are compiled into one expression: 2 us for a model of four modules
    under Adam, where a loop over them takes 8 (one thread of a Xeon with AMX).

    Args:
        spec: the step.
        options: of the optimizer's groups, None where the optimizer's step is not part of the trace.
        capture: of forward, loss and metrics.
        is_gathering: whether the trace takes gradients that are there up; else there must be none.
    """

    def __init__(
        self, spec: StepSpec, options: GroupOptions | None, capture: Capture, *, is_gathering: bool = False
    ) -> None:
        self._facts = _Facts()
        _groups_facts(spec, self._facts)
        if options is not None:
            _optimizer_facts(spec, options, self._facts)
        for parameter in () if is_gathering else spec.trained():
            # Eager would add to it, a graph does not.
            self._facts.add("a gradient that was there before the step", "{}.grad is None", parameter)
        for parameter in {id(each): each for each in (*spec.model.parameters(), *spec.trained())}.values():
            self._facts.add("a hook of a gradient", NO_GRADIENT_HOOKS, parameter)
        # `.data` may have been given memory that another tensor has, which the trace has checked.
        state = [*spec.model.parameters(), *spec.model.buffers()]
        places = list(map(Tensor.data_ptr, state)) if all(each.layout is strided for each in state) else []
        if places:
            self._facts.add("where a parameter is in memory", "list(map({}, {})) == {}", Tensor.data_ptr, state, places)
        for fact in capture.facts:
            self._facts.add(fact.reason, fact.expression, *fact.objects)
        _other_facts(spec, self._facts)
        self._hold = self._facts.all_hold()

    def mismatch(self) -> str | None:
        """What has changed since the trace, None where nothing has. Makes no host read."""
        try:
            return None if self._hold() else self._facts.first_broken()
        except (AttributeError, KeyError, ValueError):  # an entry, or what a cell held, is gone
            return self._facts.first_broken()

    def agree(self, other: Guards) -> bool:
        """True where the two differ in nothing but which tensors and groups there are (as after `load_state_dict`)."""
        return self._facts.values == other._facts.values


class _Facts:
    """Expressions that are true now, over objects that are kept under made-up names.

    Attributes:
        values: what makes the step another one if it changes, in order.
    """

    def __init__(self) -> None:
        self.values: list[Any] = []
        self._names: dict[str, Any] = {}
        self._facts: list[tuple[str, str]] = []

    def add(self, reason: str, expression: str, *objects: Any) -> None:
        """A fact: `expression`, with `{}` for each object."""
        names = [f"o{len(self._names) + index}" for index in range(len(objects))]
        self._names.update(zip(names, objects, strict=True))
        self._facts.append((reason, expression.format(*names)))

    def add_value(self, reason: str, expression: str, *objects: Any) -> None:
        """A fact of which the last object is a value that is compared."""
        self.values.append(objects[-1])
        self.add(reason, expression, *objects)

    def add_tables(self, reason: str, tables: Iterable[dict[Any, Any]], *, are_inputs: bool = True) -> None:
        """The entries of dicts stay the same objects, and no entry comes or goes.

        Tensors among them may be replaced by others where they are inputs of the graph.
        """
        for table in tables:
            self.add(reason, "len({}) == {}" if table else "not {}", *((table, len(table)) if table else (table,)))
            for key, value in table.items():
                self.add(reason, "{}[{}] is {}", table, key, value)
                if not isinstance(value, Tensor):  # another module or hook computes something else
                    self.values.append((key, value))
                elif not are_inputs:
                    self.values.append((key, id(value)))

    def all_hold(self) -> Callable[[], bool]:
        """All facts as one function."""
        return self._compiled(" and ".join(expression for _, expression in self._facts))

    def first_broken(self) -> str:
        """The reason that goes with the first fact that does not hold."""
        for reason, expression in self._facts:
            try:
                if not self._compiled(expression)():
                    return reason
            except (AttributeError, KeyError, ValueError):
                return reason
        raise AssertionError("all facts hold")

    def _compiled(self, expression: str) -> Callable[[], bool]:
        return eval(f"lambda: {expression}", self._names)  # of made-up names and our own operators only


def _groups_facts(spec: StepSpec, facts: _Facts) -> None:
    """The parameters that are trained, and whose gradients count."""
    optimizer = spec.optimizer
    facts.add("the parameter groups", "{}.param_groups is {}", optimizer, optimizer.param_groups)
    facts.add("the parameter groups", "len({}) == {}", optimizer.param_groups, len(optimizer.param_groups))
    for number, group in enumerate(optimizer.param_groups):
        facts.add("the parameter groups", "{}[{}] is {}", optimizer.param_groups, number, group)
        reason = "the parameters of a group"
        facts.add(reason, "{}['params'] is {}", group, group["params"])
        facts.add(reason, "len({}) == {}", group["params"], len(group["params"]))
        for place, parameter in enumerate(group["params"]):
            facts.add(reason, "{}[{}] is {}", group["params"], place, parameter)


def _optimizer_facts(spec: StepSpec, options: GroupOptions, facts: _Facts) -> None:
    optimizer = spec.optimizer
    facts.add_tables("a hook of the optimizer", optimizer_hooks(optimizer))
    for owner, table, names in code_of(type(optimizer)):
        if names:
            values = [table[name] for name in names]
            facts.values.append(values)
            facts.add(f"the code of {owner}", "{}(map({}, map({}.get, {}), {}))", all, is_, table, names, values)
    own = vars(optimizer)
    facts.add("the optimizer's step was replaced", "{}.get('step') is {}", own, own.get("step"))
    facts.values.append(has_own_step(optimizer))  # a scheduler's wrapper may come and go
    for name, value in own.items():
        if isinstance(value, PLAIN) and name not in _NOTES:
            facts.add_value("an attribute of the optimizer", "{}[{}] == {}", own, name, value)
    for number, group in enumerate(optimizer.param_groups):
        _options_facts(number, group, options, facts)
    facts.add("the optimizer's state", "{}.state is {}", optimizer, optimizer.state)
    facts.add("the optimizer's state", "len({}) == {}", optimizer.state, len(optimizer.state))
    # Not by key: Tensor.__hash__ is a Python function.
    entries = list(optimizer.state.values())
    facts.add("the optimizer's state", "{}(map({}, {}.values(), {}))", all, is_, optimizer.state, entries)
    facts.add_tables("the optimizer's state", optimizer.state.values())


_NOTES = frozenset(
    {"_opt_called", "_step_count", "_need_device_dtype_check_for_fused", "_warned_capturable_if_run_uncaptured"}
)
"""Attributes in which torch keeps notes of its own; they change nothing that is computed."""


def _options_facts(number: int, group: dict[str, Any], options: GroupOptions, facts: _Facts) -> None:
    """What the optimizer's code does not ask for, such as a scheduler's own notes, may come and go."""
    reason = "an option of a parameter group"
    if options.read is None:
        facts.add_value(reason, "len({}) == {}", group, len(group))
    for name in sorted(group if options.read is None else options.read):
        if name == "params" or (number, name) in options.inputs:
            continue
        if name not in group:
            facts.add_value(reason, "{1} not in {0}", group, name)
        elif isinstance(group[name], Tensor):
            facts.add(reason, "{}[{}] is {}", group, name, group[name])
        else:
            facts.add_value(reason, "{}[{}] == {}", group, name, group[name])


def _other_facts(spec: StepSpec, facts: _Facts) -> None:
    metrics = spec.metrics
    facts.add("the running metrics", "{}.totals is {}", metrics, metrics.totals)
    facts.add_tables("the running metrics", [metrics.user_metrics])
    facts.add_value("the rule of accuracy", "{}.rule == {}", metrics, metrics.rule)
    if spec.scaler is not None:
        scaler, found = spec.scaler, scaler_tensors(spec.scaler)
        facts.add("the gradient scaler", "{}(map({}, {}({}), {}))", all, is_, scaler_tensors, scaler, found)
        for ask in (scaler.get_growth_factor, scaler.get_backoff_factor, scaler.get_growth_interval):
            facts.add_value("the gradient scaler", "{}() == {}", ask, ask())
    # Inference mode and autocast show in the tensors' own guards.
    for ask in (is_grad_enabled, get_default_dtype):
        facts.add_value("grad mode or torch's default dtype", "{}() is {}", ask, ask())
