# ruff: noqa: E501
# fmt: off
"""Random training jobs as Python source: `python -m tests.step.fuzzing SEED` prints one, runs it both ways and compares.

A job is a module of its own: a model, an optimizer and a forward that read Python values from drawn homes, and a schedule
of statements that change something between two steps. It is trained by a plain loop and by `FastLoop`, in fp64, from two
copies of the module that share nothing. After every step losses, parameters and everything else that is reachable from
the module must be the same; a refusal with a reason ends the job.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["Change", "Job", "draw_job"]


@dataclass(frozen=True)
class Kind:
    """A kind of values.

    Attributes:
        values: literals.
        uses: expressions that make a number or a scalar tensor of a value `{r}`.
        changes: statements that change a value `{r}` in place.
    """

    values: Sequence[str]
    uses: Sequence[str]
    changes: Sequence[str] = ()


@dataclass(frozen=True)
class Home:
    """A place where a value stays; `{n}` is its number, `{v}` the value, `{m}` the model.

    Attributes:
        read: the expression that forward reads it by.
        sets: statements that put another value `{w}` there.
        top: lines of the module.
        base, cls: lines of the model's base class and class.
        init: lines of the model's `__init__`.
    """

    read: str
    sets: Sequence[str]
    top: str = ""
    base: str = ""
    cls: str = ""
    init: str = ""


@dataclass(frozen=True)
class Change:
    """A statement that runs before a step."""

    step: int
    statement: str


@dataclass
class Job:
    """A drawn job.

    Attributes:
        source: of its module, which has `build()` and `make_batch(x, y, step)`.
        changes: what runs between steps.
        options: of FastLoop.
        is_resident: whether its batches are rows of resident data.
        has_thread: whether another thread works meanwhile.
    """

    seed: int
    source: str
    changes: list[Change]
    steps: int
    options: dict[str, object] = field(default_factory=dict[str, object])
    is_resident: bool = False
    has_thread: bool = False
    traits: list[str] = field(default_factory=list[str])

    def recipe(self) -> str:
        """All of it, to read."""
        changes = "\n".join(f"# before step {each.step}: {each.statement}" for each in self.changes)
        more = f"# options {self.options}, resident {self.is_resident}, thread {self.has_thread}, {self.steps} steps"
        return f"# seed {self.seed}\n{self.source}\n{changes}\n{more}\n# {', '.join(self.traits)}\n"


KINDS = {
    "float": Kind(["0.5", "1.5", "2.0", "-1.0", "0.0"], ["{r}", "(2.0 if {r} > 1 else 1.0)", "float({r})", "math.exp({r})", "round({r} * 3)", 'float(f\"\"\"{{{r}:.3f}}\"\"\")']),
    "int": Kind(["1", "2", "3", "0"], ["{r}", "sum(0.5 for _ in range({r}))", "TABLE[{r}]", "x[{r}].mean()", "x[:, {r}].sum()", "{{1: 0.5, 2: 3.0}}.get({r}, 1.0)", "sum(q for q in TABLE[:{r}])", "float(bin({r}).count('1'))", "1.0 * 0.5 ** {r}", "torch.zeros(3, {r} + 1).numel() * 0.1", "(x.roll({r}, 0) * x).mean()", "x.repeat(1, {r} + 1).sum()", "x.sum(dim={r} % 2).mean()", "(x ** {r}).mean()", "float(len(range({r})))"]),
    "bool": Kind(["True", "False", "1", "0"], ["(2.0 if {r} else 1.0)", "{r} * 1.5", "float(not {r})", "(2.0 if {r} is True else 1.0)", "(2.0 if {r} == 1 else 1.0)", "(2.0 if isinstance({r}, bool) else 1.0)", "{{'True': 1.0, '1': 2.0}}.get(str({r}), 3.0)"]),
    "none": Kind(["None", "0.0", "2.5", "''"], ["(1.0 if {r} is None else 2.0)", "({r} or 3.0)", "(1.0 if not {r} else 2.0)", "float(str({r}) == 'None')"]),
    "str": Kind(["'a'", "'b'", "'ab'", "''"], ["{{'a': 1.0, 'b': 2.0}}.get({r}, 3.0)", "float(len({r}))", '{{"k_a": 1.0, "k_b": 2.0}}.get(f\"\"\"k_{{{r}}}\"\"\", 0.5)', "float('a' in {r})", "(2.0 if {r} == 'a' else 1.0)", "(2.0 if {r}.startswith('a') else 1.0)", "{{'A': 3.0}}.get({r}.upper(), 1.0)", "{{'k_a': 1.0}}.get('k_' + {r}, 0.5)", "{{'k_a': 1.0}}.get('k_%s' % {r}, 0.5)", "getattr(TARGET, 'attr_' + {r}, 0.25)"]),
    "tuple": Kind(["(1.0, 2.0)", "(2.0, 1.0)", "(1.0,)", "(3.0, 2.0, 1.0)", "(1, True)"], ["{r}[0]", "sum({r})", "float(len({r}))", "{r}[-1]", "max({r})", "float(1.0 in {r})", "float(sorted({r})[0])", "sum(i * e for i, e in enumerate({r}))", "(2.0 if {r} == (1.0, 2.0) else 1.0)", "{{(1.0, 2.0): 3.0}}.get({r}, 0.5)"]),
    "list": Kind(["[1.0, 2.0]", "[2.0, 1.0]", "[3.0]", "[1.0, 2.0, 3.0]"], ["{r}[0]", "sum({r})", "float(len({r}))", "{r}[-1]", "min({r})", "float(3.0 in {r})", "sum(e for e in {r} if e > 1)", "sum(a * b for a, b in zip({r}, TABLE))", "(2.0 if {r} == [1.0, 2.0] else 1.0)", "sum({r}[::-1][:1])", "{r}.index({r}[-1])", "x.mean() * torch.tensor({r}, dtype=x.dtype).sum()"], ["{r}.append(5.0)", "{r}[0] = 7.0", "{r}.reverse()", "{r}.insert(0, 0.25)", "{r}[-1] = 1", "{r}.extend([1.0, 1.0])", "{r}[:] = [4.0]"]),
    "dict": Kind(["{'a': 1.0, 'b': 2.0}", "{'b': 2.0, 'a': 1.0}", "{'a': 3.0}", "OrderedDict(a=1.0, b=2.0)", "SubDict(a=1.0, b=2.0)", "defaultdict(float, a=1.0)", "{1: 1.0, 'a': 2.0}"], ["{r}['a']", "sum({r}.values())", "float(len({r}))", "list({r}.values())[0]", "next(iter({r}.values()))", "{r}.get('c', 0.5)", "float('b' in {r})", "sum(i * v for i, v in enumerate({r}.values()))", "sum(v for k, v in {r}.items() if k == 'a')", "float(list({r})[0] == 'a')", "ident(**{{'v': {r}['a']}})"], ["{r}['a'] = 9.0", "{r}['c'] = 4.0", "{r}.update(b=0.25)", "{r}['a'] = {r}.pop('a')", "{r}.setdefault('d', 6.0)"]),
    "set": Kind(["{1.0, 2.0}", "{2.0}", "frozenset({1.0, 3.0})", "{1.0, 2.0, 3.0}"], ["float(1.0 in {r})", "float(len({r}))", "sum(sorted({r}))", "float(3.0 in {r})"], ["{r}.add(3.0) if isinstance({r}, set) else None", "{r}.discard(1.0) if isinstance({r}, set) else None", "{r}.clear() if isinstance({r}, set) else None"]),
    "enum": Kind(["Color.RED", "Color.BLUE", "Level.LOW", "Level.HIGH", "Flag.A", "Flag.A | Flag.B"], ["float({r}.value)", "(2.0 if {r} is Color.RED else 1.0)", "(2.0 if {r} == 2 else 1.0)", "{{Color.RED: 2.0}}.get({r}, 1.0)", "float(len(str({r}.name)))", "(2.0 if {r} in (Color.BLUE, Level.HIGH) else 1.0)"]),
    "tensor": Kind(["torch.tensor(2.0)", "torch.tensor(0.5)", "torch.tensor(3.0)", "torch.tensor([1.0, 2.0])", "nn.Parameter(torch.tensor(1.5), requires_grad=False)", "torch.ones(2, 2) * 2"], ["{r}.sum()", "({r} * x.mean()).mean()", "torch.where({r} > 1, 2.0, 1.0).mean()", "{r}.detach().sum()", "torch.clamp({r}, max=1.0).sum()", "float({r}.dim())", "float({r}.shape[0]) if {r}.dim() else 0.5", "(2.0 if {r}.requires_grad else 1.0)", "float({r}.numel())"], ["{r}.fill_(3.0)", "{r}.mul_(2.0)", "setattr({r}, 'data', torch.full_like({r}, 4.0))", "setattr({r}, 'data', torch.ones(3))", "{r}.requires_grad_({r}.is_leaf and False)", "{r}.add_(1)", "{r}.data.add_(1.0)"]),
    "function": Kind(["double", "negate", "math.sin", "torch.sin", "operator.neg", "abs", "lambda v: v * 4.0", "functools.partial(operator.mul, 3.0)", "F.relu", "nn.ReLU()", "Caller(2.0)", "Caller(3.0).call", "Caller.make"], ["{r}(torch.ones(())) * 1.0 if {r} is not math.sin else 2.5", "{r}(out.mean().detach()) if {r} not in (math.sin,) else 2.5", "float({r} is double)", "(2.0 if callable({r}) and {r} == abs else 1.0)", "float(len(getattr({r}, '__name__', '')))", "float(len(getattr({r}, '__doc__', None) or ''))"], ["setattr(double, '__code__', (lambda v: v * 5.0).__code__)", "setattr(double, '__code__', double_again.__code__)", "setattr(Caller, '__call__', lambda self, v: v * 9.0)", "setattr(Caller, 'call', lambda self, v: v * 8.0)", "setattr(Caller, 'make', classmethod(lambda cls, v: v * 7.0))", "setattr(Caller, 'static', staticmethod(lambda v: v * 6.0))", "globals().__setitem__('double', negate)"]),
    "class": Kind(["Alpha", "Beta", "Gamma", "int", "float", "nn.Linear"], ["float(getattr({r}, 'factor', 0.5))", "(2.0 if {r} is Alpha else 1.0)", "(2.0 if isinstance(THING, {r}) else 1.0)", "(2.0 if issubclass({r}, Alpha) else 1.0)", "float(len({r}.__name__))", "float(len({r}.__mro__))", "float(len({r}.__doc__ or ''))", "float(getattr({r}(), 'factor', 0.5)) if {r} in (Alpha, Beta, Gamma) else 1.5"], ["Gamma.__bases__ = (Beta,)", "setattr(Alpha, '__doc__', 'a doc')", "Alpha.__name__ = 'Longer'", "del Gamma.factor", "setattr(Alpha, 'factor', 4.0)", "setattr(Beta, 'factor', 4.5)", "setattr(Alpha, '__init__', lambda self: setattr(self, 'factor', 8.0))", "globals().__setitem__('THING', Beta())", "setattr(THING, '__class__', Gamma)"]),
    "dtype": Kind(["torch.float32", "torch.float64", "torch.int64", "torch.bfloat16"], ["(x * 1.3).to({r}).double().mean()", "torch.full((), 1.7).to({r}).double()", "(2.0 if {r} == torch.float32 else 1.0)", "(2.0 if {r}.is_floating_point else 1.0)", "float({r}.itemsize)", "x.sum(dtype={r}).double()"]),
    "slice": Kind(["slice(0, 2)", "slice(1, None)", "slice(None, None, 2)", "slice(None)"], ["x[:, {r}].sum()", "x[{r}].mean()", "sum(TABLE[{r}])", "float(len(TABLE[{r}]))", "out[..., {r}].mean()"]),
    "complex": Kind(["1 + 2j", "2 + 1j", "0j", "(1 + 0j)"], ["{r}.real", "abs({r})", "{r}.imag", "({r} * {r}).real"]),
    "nan": Kind(["float('nan')", "1.0", "float('inf')", "-0.0", "0.0"], ["(2.0 if {r} == {r} else 1.0)", "(2.0 if {r} > 1 else 1.0)", "(2.0 if math.isnan({r}) else 1.0)", "math.copysign(1.0, {r})", "(x + {r}).nan_to_num(0.0, 1.0, 1.0).mean()", "torch.clamp(x, max={r}).nan_to_num(1.0).mean()"]),
    "numpy": Kind(["np.float64(2.0)", "np.float32(0.5)", "np.int64(3)", "np.array([1.0, 2.0])", "np.array(2.0)", "np.bool_(True)", "np.str_('a')"], ["float(np.sum({r}))", "{r} * 1.0", "x.mean() * float({r})", "(2.0 if {r} is None else 1.0)", "torch.as_tensor({r}).sum().double()", "float({r}.shape == ())", "torch.full((), 2.0) * {r}"], ["{r}.__setitem__(..., 3.0)", "{r}.__setitem__(0, 7.0)"]),
    "object": Kind(["Caller(2.0)", "Caller(3.0)", "Point(1.0, 2.0)", "Point(2.0, 1.0)", "types.SimpleNamespace(value=2.0)", "Slotted(2.0)", "Lazy(2.0)", "Frozen(2.0)", "Pair(2.0, 3.0)", "Described(2.0)", "Getter(2.0)", "Deep(2.0)"], ["{r}.value", "float({r}.value > 1)", "getattr({r}, 'value')", "float(hasattr({r}, 'extra'))", "getattr({r}, 'extra', 0.5)", "vars({r}).get('value', 0.5) if hasattr({r}, '__dict__') else 1.0", "float(type({r}).__name__ == 'Caller')"], ["setattr({r}, 'value', 4.0)", "setattr({r}, 'extra', 5.0)", "setattr(type({r}), 'value', 6.0)", "setattr(type({r}), 'value', property(lambda self: 7.0))", "setattr(type({r}), 'extra', 8.0)", "setattr({r}, '__class__', Caller)", "setattr(type({r}), '__getattribute__', lambda self, name: 9.0 if name == 'value' else object.__getattribute__(self, name))", "setattr(type({r}), '__getattr__', lambda self, name: 3.0)"]),
}

_GETTERS = """
def make_cell{n}():
    cell = {v}
    def get():
        return cell
    def put(value):
        nonlocal cell
        cell = value
    return get, put
get{n}, put{n} = make_cell{n}()
"""

_NESTED = """
def outer{n}():
    hidden = [{v}]
    def middle():
        def inner():
            return hidden[0]
        return inner()
    middle.hidden = hidden
    return middle
nested{n} = outer{n}()
"""

HOMES = {
    "global": Home("G{n}", ["globals()['G{n}'] = {w}"], top="G{n} = {v}"),
    "global helper": Home("helper{n}()", ["globals()['G{n}'] = {w}", "globals()['helper{n}'] = lambda: {w}"], top="G{n} = {v}\ndef helper{n}():\n    return G{n}"),
    "global two deep": Home("deep{n}()", ["globals()['G{n}'] = {w}"], top="G{n} = {v}\ndef helper{n}():\n    return G{n}\ndef deep{n}():\n    return helper{n}()"),
    "module": Home("M{n}.value", ["M{n}.value = {w}", "setattr(M{n}, 'value', {w})"], top="M{n} = sys.modules[__name__ + '_m{n}'] = types.ModuleType(__name__ + '_m{n}')\nM{n}.value = {v}"),
    "sys module": Home("sys.modules['fuzz_home'].value{n}", ["sys.modules['fuzz_home'].value{n} = {w}"], top="import fuzz_home\nfuzz_home.value{n} = {v}"),
    "imported in forward": Home("imported{n}()", ["fuzz_home.value{n} = {w}"], top="import fuzz_home\nfuzz_home.value{n} = {v}\ndef imported{n}():\n    from fuzz_home import value{n}\n    return value{n}"),
    "instance": Home("{m}.a{n}", ["model.a{n} = {w}", "vars(model)['a{n}'] = {w}", "object.__setattr__(model, 'a{n}', {w})"], init="self.a{n} = {v}"),
    "instance of child": Home("{m}.fc.a{n}", ["model.fc.a{n} = {w}"], init="self.fc.a{n} = {v}"),
    "class": Home("{m}.a{n}", ["Net.a{n} = {w}", "model.a{n} = {w}", "Base.a{n} = {w}\ndel Net.a{n}", "model.__class__.a{n} = {w}"], cls="a{n} = {v}"),
    "class by name": Home("Net.a{n}", ["Net.a{n} = {w}", "model.a{n} = {w}"], cls="a{n} = {v}"),
    "base class": Home("{m}.b{n}", ["Base.b{n} = {w}", "Net.b{n} = {w}", "model.b{n} = {w}"], base="b{n} = {v}"),
    "hasattr": Home("getattr({m}, 'later{n}', {v})", ["model.later{n} = {w}", "Net.later{n} = {w}", "Base.later{n} = {w}"]),
    "super method": Home("{m}.m{n}()", ["Base.m{n} = lambda self: {w}", "Net.m{n} = lambda self: {w}", "model.m{n} = lambda: {w}", "Base.m{n}.__code__ = (lambda self: {w}).__code__"], base="def m{n}(self):\n    return {v}", cls="def m{n}(self):\n    return super().m{n}()"),
    "super attribute": Home("{m}.m{n}()", ["Base.b{n} = {w}"], base="b{n} = {v}", cls="def m{n}(self):\n    return super().b{n}"),
    "method": Home("{m}.m{n}()", ["Net.m{n} = lambda self: {w}", "model.m{n} = lambda: {w}", "model.m{n} = types.MethodType(lambda self: {w}, model)"], cls="def m{n}(self):\n    return {v}"),
    "static": Home("{m}.m{n}()", ["Net.m{n} = staticmethod(lambda: {w})", "model.m{n} = lambda: {w}"], cls="@staticmethod\ndef m{n}():\n    return {v}"),
    "classmethod": Home("{m}.m{n}()", ["Net.m{n} = classmethod(lambda cls: {w})", "Net.c{n} = {w}", "model.m{n} = lambda: {w}"], cls="c{n} = {v}\n@classmethod\ndef m{n}(cls):\n    return cls.c{n}"),
    "property": Home("{m}.p{n}", ["Net.p{n} = property(lambda self: {w})", "model.hidden{n} = {w}"], cls="@property\ndef p{n}(self):\n    return self.hidden{n}", init="self.hidden{n} = {v}"),
    "cached property": Home("CACHED{n}.p", ["CACHED{n}.__dict__['p'] = {w}", "CACHED{n}.__dict__.pop('p', None)\nglobals()['G{n}'] = {w}"], top="G{n} = {v}\nclass Cached{n}:\n    @functools.cached_property\n    def p(self):\n        return G{n}\nCACHED{n} = Cached{n}()\nCACHED{n}.p"),
    "closure": Home("get{n}()", ["put{n}({w})"], top=_GETTERS),
    "cell": Home("get{n}()", ["get{n}.__closure__[0].cell_contents = {w}"], top=_GETTERS),
    "nested closure": Home("nested{n}()", ["nested{n}.hidden[0] = {w}"], top=_NESTED),
    "default": Home("d{n}()", ["d{n}.__defaults__ = ({w},)"], top="def d{n}(value={v}):\n    return value"),
    "keyword default": Home("d{n}()", ["d{n}.__kwdefaults__ = {{'value': {w}}}", "d{n}.__kwdefaults__['value'] = {w}"], top="def d{n}(*, value={v}):\n    return value"),
    "default of method": Home("{m}.m{n}()", ["Net.m{n}.__defaults__ = ({w},)"], cls="def m{n}(self, value={v}):\n    return value"),
    "code": Home("f{n}()", ["f{n}.__code__ = (lambda: {w}).__code__", "globals()['f{n}'] = lambda: {w}"], top="def f{n}():\n    return {v}"),
    "function attribute": Home("f{n}.value", ["f{n}.value = {w}"], top="def f{n}():\n    pass\nf{n}.value = {v}"),
    "containers": Home("C{n}['in'][0]", ["C{n}['in'][0] = {w}", "C{n}['in'] = [{w}]", "globals()['C{n}'] = {{'in': ({w},)}}", "C{n}['in'].insert(0, {w})"], top="C{n} = {{'in': [{v}]}}"),
    "containers of model": Home("{m}.c{n}[1]['k']", ["model.c{n}[1]['k'] = {w}", "model.c{n}[1] = {{'k': {w}}}", "model.c{n} = [0, {{'k': {w}}}]"], init="self.c{n} = [0, {{'k': {v}}}]"),
    "list of class": Home("{m}.c{n}[-1]", ["Net.c{n}.append({w})", "Net.c{n}[-1] = {w}", "model.c{n} = [{w}]"], cls="c{n} = [{v}]"),
    "object in list": Home("[o.value for o in L{n}][0]", ["L{n}[0].value = {w}", "L{n}.insert(0, types.SimpleNamespace(value={w}))"], top="L{n} = [types.SimpleNamespace(value={v})]"),
    "dict values": Home("list(D{n}.values())[-1]", ["D{n}['z'] = {w}", "D{n}['a'] = {w}"], top="D{n} = {{'a': {v}}}"),
    "object": Home("O{n}.value", ["O{n}.value = {w}", "globals()['O{n}'] = Caller({w})", "vars(O{n})['value'] = {w}"], top="O{n} = Caller({v})"),
    "object of class": Home("O{n}.v", ["Kept{n}.v = {w}", "O{n}.v = {w}"], top="class Kept{n}:\n    v = {v}\nO{n} = Kept{n}()"),
    "slots": Home("O{n}.value", ["O{n}.value = {w}", "globals()['O{n}'] = Slotted({w})"], top="O{n} = Slotted({v})"),
    "dataclass": Home("O{n}.x", ["O{n}.x = {w}", "globals()['O{n}'] = dataclasses.replace(O{n}, x={w})"], top="O{n} = Point({v}, 0)"),
    "frozen": Home("O{n}.value", ["globals()['O{n}'] = Frozen({w})", "object.__setattr__(O{n}, 'value', {w})"], top="O{n} = Frozen({v})"),
    "named tuple": Home("O{n}.first", ["globals()['O{n}'] = O{n}._replace(first={w})"], top="O{n} = Pair({v}, 0)"),
    "getattr": Home("O{n}.anything", ["O{n}.table['anything'] = {w}", "O{n}.anything = {w}"], top="O{n} = Getter({v})\nO{n}.table = {{'anything': {v}}}"),
    "getattribute": Home("O{n}.value", ["O{n}.value = {w}"], top="O{n} = Deep({v})"),
    "descriptor": Home("O{n}.value", ["O{n}.value = {w}", "O{n}.hidden = {w}", "Described.value = Described.other"], top="O{n} = Described({v})"),
    "module getattr": Home("{m}.dyn{n}", ["model.extra['dyn{n}'] = {w}", "model.dyn{n} = {w}", "Net.dyn{n} = {w}"], init="self.extra['dyn{n}'] = {v}"),
    "metaclass": Home("Made{n}.v", ["Meta.v = {w}", "Made{n}.v = {w}"], top="class Meta(type):\n    v = {v}\nclass Made{n}(metaclass=Meta):\n    pass"),
    "partial": Home("P{n}()", ["globals()['P{n}'] = functools.partial(ident, {w})"], top="P{n} = functools.partial(ident, {v})"),
    "partial keyword": Home("P{n}()", ["globals()['P{n}'] = functools.partial(ident, v={w})", "P{n}.keywords['v'] = {w}"], top="P{n} = functools.partial(ident, v={v})"),
    "param group": Home("OPT.param_groups[0]['extra{n}']", ["opt.param_groups[0]['extra{n}'] = {w}"], top="EXTRA['extra{n}'] = {v}"),
    "bound method": Home("B{n}()", ["globals()['B{n}'] = Caller({w}).get", "B{n}.__self__.value = {w}"], top="B{n} = Caller({v}).get"),
    "decorated": Home("f{n}()", ["G{n}[0] = {w}", "f{n}.__wrapped__.__code__ = (lambda: {w}).__code__"], top="G{n} = [{v}]\n@decorate\ndef f{n}():\n    return G{n}[0]"),
    "generator": Home("next(g{n}())", ["globals()['G{n}'] = {w}"], top="G{n} = {v}\ndef g{n}():\n    yield G{n}\n    yield 0"),
    "context manager": Home("cm{n}()", ["globals()['G{n}'] = {w}"], top="G{n} = {v}\n@contextlib.contextmanager\ndef managed{n}():\n    yield G{n}\ndef cm{n}():\n    with managed{n}() as value:\n        return value"),
    "own context manager": Home("cm{n}()", ["O{n}.value = {w}", "Caller.__enter__ = lambda self: {w}"], top="O{n} = Caller({v})\ndef cm{n}():\n    with O{n} as value:\n        return value"),
    "mutable default": Home("d{n}()", ["d{n}.__defaults__[0][0] = {w}", "d{n}.__defaults__[0].insert(0, {w})"], top="def d{n}(values=[{v}]):\n    return values[0]"),
    "enum attribute": Home("E{n}.ONE.payload", ["E{n}.ONE.payload = {w}"], top="class E{n}(enum.Enum):\n    ONE = 1\nE{n}.ONE.payload = {v}"),
    "environment": Home("EV{n}[os.environ.get('FUZZ{n}', 'a')]", ["EV{n}['b'] = {w}\nos.environ['FUZZ{n}'] = 'b'"], top="EV{n} = {{'a': {v}, 'b': {v}}}"),
    "sequence of modules": Home("[c.a{n} for c in {m}.children() if hasattr(c, 'a{n}')][-1]", ["model.act.a{n} = {w}", "model.fc.a{n} = {w}"], init="self.fc.a{n} = {v}"),
    "dunder len": Home("(ident({v}) if len(O{n}) == 2 else EV{n})", ["O{n}.size = 3"], top="O{n} = Sized()\nEV{n} = {v}"),
    "exception": Home("tried{n}()", ["D{n}['k'] = {w}"], top="D{n} = {{}}\ndef tried{n}():\n    try:\n        return D{n}['k']\n    except KeyError:\n        return {v}"),
    "abc": Home("({v} if isinstance(THING, Registered) else ALT{n})", ["ALT{n}_ = None\nglobals()['ALT{n}'] = {w}\nRegistered.register(Gamma)", "globals()['ALT{n}'] = {w}"], top="ALT{n} = {v}"),
    "instance check": Home("({v} if isinstance(THING, Checked{n}) else ALT{n})", ["globals()['ALT{n}'] = {w}\nCheck{n}.answer = False", "globals()['ALT{n}'] = {w}\nCheck{n}.__instancecheck__ = lambda cls, o: False"], top="ALT{n} = {v}\nclass Check{n}(type):\n    answer = True\n    def __instancecheck__(cls, o):\n        return cls.answer\nclass Checked{n}(metaclass=Check{n}):\n    pass"),
    "metaclass method": Home("Made{n}.m()", ["Meta{n}.m = lambda cls: {w}", "Meta{n}.m.__code__ = (lambda cls: {w}).__code__", "Made{n}.m = lambda: {w}"], top="class Meta{n}(type):\n    def m(cls):\n        return {v}\nclass Made{n}(metaclass=Meta{n}):\n    pass"),
    "metaclass property": Home("Made{n}.p", ["Meta{n}.p = property(lambda cls: {w})"], top="class Meta{n}(type):\n    @property\n    def p(cls):\n        return {v}\nclass Made{n}(metaclass=Meta{n}):\n    pass"),
    "module getattr function": Home("M{n}.lazy", ["M{n}.table['lazy'] = {w}", "M{n}.lazy = {w}"], top="M{n} = sys.modules[__name__ + '_m{n}'] = types.ModuleType(__name__ + '_m{n}')\nM{n}.table = {{'lazy': {v}}}\nM{n}.__getattr__ = lambda name, table=M{n}.table: table[name]"),
    "reloaded": Home("R{n}.value()", ["exec('def value(): return X', vars(R{n}))\nR{n}.X = {w}", "R{n}.value = lambda: {w}"], top="R{n} = sys.modules[__name__ + '_m{n}'] = types.ModuleType(__name__ + '_m{n}')\nexec('def value(): return X', vars(R{n}))\nR{n}.X = {v}"),
    "reloaded class": Home("R{n}.K().get()", ["exec('class K:\\n  def get(self): return X', vars(R{n}))\nR{n}.X = {w}", "R{n}.K.get = lambda self: {w}"], top="R{n} = sys.modules[__name__ + '_m{n}'] = types.ModuleType(__name__ + '_m{n}')\nexec('class K:\\n  def get(self): return X', vars(R{n}))\nR{n}.X = {v}"),
    "shadowed": Home("{m}.s{n}", ["del model.s{n}\nNet.s{n} = {w}", "Net.s{n} = {w}", "Net.s{n} = {w}\nvars(model).pop('s{n}', None)"], cls="s{n} = None", init="self.s{n} = {v}"),
    "shadowed object": Home("O{n}.v", ["vars(O{n}).pop('v', None)", "Kept{n}.v = property(lambda self: {w})", "Kept{n}.v = {w}"], top="class Kept{n}:\n    v = None\nO{n} = Kept{n}()\nO{n}.v = {v}"),
    "missing name": Home("late{n}()", ["globals()['LATE{n}'] = {w}"], top="def late{n}():\n    try:\n        return LATE{n}\n    except NameError:\n        return {v}"),
    "missing attribute": Home("late{n}()", ["O{n}.late = {w}", "Kept{n}.late = {w}", "Kept{n}.__getattr__ = lambda self, name: {w}"], top="class Kept{n}:\n    pass\nO{n} = Kept{n}()\ndef late{n}():\n    try:\n        return O{n}.late\n    except AttributeError:\n        return {v}"),
    "missing attribute of model": Home("late{n}({m})", ["model.late = {w}", "Net.late = {w}", "Base.late = {w}"], top="def late{n}(model):\n    try:\n        return model.late\n    except AttributeError:\n        return {v}"),
    "missing index": Home("late{n}()", ["L{n}.append({w})"], top="L{n} = []\ndef late{n}():\n    try:\n        return L{n}[0]\n    except IndexError:\n        return {v}"),
    "missing computed key": Home("late{n}()", ["D{n}['k' + 'ey'] = {w}"], top="D{n} = {{}}\ndef late{n}():\n    try:\n        return D{n}['k'.upper().lower() + 'ey']\n    except KeyError:\n        return {v}"),
    "missing nested": Home("late{n}()", ["D{n}['a']['b'] = {w}"], top="D{n} = {{'a': {{}}}}\ndef late{n}():\n    try:\n        return D{n}['a']['b']\n    except (KeyError, TypeError):\n        return {v}"),
    "get": Home("D{n}.get('late', {v})", ["D{n}['late'] = {w}"], top="D{n} = {{}}"),
    "in": Home("(D{n}['late'] if 'late' in D{n} else {v})", ["D{n}['late'] = {w}"], top="D{n} = {{}}"),
    "getenv": Home("EV{n}[os.getenv('FUZZ{n}', 'a')]", ["EV{n}['b'] = {w}\nos.environ['FUZZ{n}'] = 'b'"], top="EV{n} = {{'a': {v}, 'b': {v}}}"),
    "environ": Home("EV{n}[os.environ['FUZZ{n}']]", ["EV{n}['b'] = {w}\nos.environ['FUZZ{n}'] = 'b'"], top="EV{n} = {{'a': {v}, 'b': {v}}}\nos.environ['FUZZ{n}'] = 'a'"),
    "in globals": Home("(LATE{n} if 'LATE{n}' in globals() else {v})", ["globals()['LATE{n}'] = {w}"]),
    "bases": Home("Low{n}().v", ["Low{n}.__bases__ = (Other{n},)\nOther{n}.v = {w}", "High{n}.v = {w}"], top="class High{n}:\n    v = {v}\nclass Other{n}:\n    v = {v}\nclass Low{n}(High{n}):\n    pass"),
    "bases of kept": Home("LOW{n}.v", ["Low{n}.__bases__ = (Other{n},)\nOther{n}.v = {w}", "Low{n}.v = {w}", "LOW{n}.__class__ = Other{n}\nOther{n}.v = {w}"], top="class High{n}:\n    v = {v}\nclass Other{n}:\n    v = {v}\nclass Low{n}(High{n}):\n    pass\nLOW{n} = Low{n}()"),
    "base method": Home("LOW{n}.m()", ["Low{n}.__bases__ = (Other{n},)\nOther{n}.m = lambda self: {w}", "High{n}.m = lambda self: {w}", "LOW{n}.m = lambda: {w}"], top="class High{n}:\n    def m(self):\n        return {v}\nclass Other{n}:\n    def m(self):\n        return {v}\nclass Low{n}(High{n}):\n    pass\nLOW{n} = Low{n}()"),
    "single dispatch": Home("disp{n}(THING)", ["disp{n}.register(Gamma)(lambda o: {w})", "disp{n}.register(Alpha, lambda o: {w})"], top="@functools.singledispatch\ndef disp{n}(o):\n    return {v}"),
    "attrgetter": Home("A{n}(O{n})", ["O{n}.value = {w}", "globals()['A{n}'] = operator.attrgetter('other')\nO{n}.other = {w}"], top="O{n} = Caller({v})\nA{n} = operator.attrgetter('value')"),
    "methodcaller": Home("A{n}(O{n})", ["O{n}.value = {w}", "Caller.get = lambda self: {w}"], top="O{n} = Caller({v})\nA{n} = operator.methodcaller('get')"),
    "call": Home("O{n}()", ["Kept{n}.__call__ = lambda self: {w}", "O{n}.v = {w}"], top="class Kept{n}:\n    def __init__(self):\n        self.v = {v}\n    def __call__(self):\n        return self.v\nO{n} = Kept{n}()"),
    "getitem": Home("O{n}[0]", ["Kept{n}.__getitem__ = lambda self, at: {w}", "O{n}.v = {w}"], top="class Kept{n}:\n    def __init__(self):\n        self.v = {v}\n    def __getitem__(self, at):\n        return self.v\nO{n} = Kept{n}()"),
    "missing": Home("O{n}['gone']", ["Kept{n}.__missing__ = lambda self, key: {w}", "O{n}['gone'] = {w}"], top="class Kept{n}(dict):\n    def __missing__(self, key):\n        return {v}\nO{n} = Kept{n}()"),
    "default factory": Home("(O{n}['gone'] if 'gone' in O{n} else {v})", ["O{n}['gone'] = {w}"], top="O{n} = defaultdict(lambda: {v})"),
    "list subclass": Home("O{n}.v", ["O{n}.v = {w}", "Kept{n}.v = {w}\nvars(O{n}).pop('v', None)"], top="class Kept{n}(list):\n    pass\nO{n} = Kept{n}([1.0])\nO{n}.v = {v}"),
    "dict subclass": Home("O{n}['k']", ["O{n}['k'] = {w}", "Kept{n}.__getitem__ = lambda self, key: {w}"], top="class Kept{n}(dict):\n    def __getitem__(self, key):\n        return super().__getitem__(key)\nO{n} = Kept{n}(k={v})"),
    "ordered dict": Home("list(O{n}.values())[0]", ["O{n}['a'] = {w}", "O{n}['b'] = {w}\nO{n}.move_to_end('b', last=False)"], top="O{n} = OrderedDict(a={v})"),
    "autograd function": Home("(Times{n}.apply(out), G{n})[1]", ["globals()['G{n}'] = {w}"], top="G{n} = {v}\nclass Times{n}(torch.autograd.Function):\n    @staticmethod\n    def forward(ctx, a):\n        return a * 2\n    @staticmethod\n    def backward(ctx, g):\n        return g * 2"),
    "module of modules": Home("{m}.child{n}.v", ["model.child{n} = Child{n}()\nmodel.child{n}.v = {w}", "model.child{n}.v = {w}", "Child{n}.v = {w}\nvars(model.child{n}).pop('v', None)"], init="self.child{n} = Child{n}()\nself.child{n}.v = {v}", top="class Child{n}(nn.Module):\n    v = None"),
    "module dict": Home("{m}.kids{n}['k'].v", ["model.kids{n}['k'].v = {w}", "model.kids{n}['k'] = nn.Identity()\nmodel.kids{n}['k'].v = {w}"], init="self.kids{n} = nn.ModuleDict({{'k': nn.Identity()}})\nself.kids{n}['k'].v = {v}"),
    "hook of module": Home("hooked{n}({m})", ["G{n}[0] = {w}"], top="G{n} = [{v}]\ndef hooked{n}(model):\n    return G{n}[0]"),
    "lambda in dict": Home("D{n}['f']()", ["D{n}['f'] = lambda: {w}", "D{n}['f'].__code__ = (lambda: {w}).__code__"], top="D{n} = {{'f': lambda: {v}}}"),
    "lambda in closure": Home("call{n}()", ["call{n}.__closure__[0].cell_contents = lambda: {w}"], top="def make{n}():\n    inner = lambda: {v}\n    def call():\n        return inner()\n    return call\ncall{n} = make{n}()"),
    "two closures": Home("calls{n}[1]()", ["calls{n}.reverse()", "calls{n}[1] = lambda: {w}"], top="def make{n}(value):\n    return lambda: value\ncalls{n} = [make{n}({v}), make{n}({v})]"),
    "string key": Home("getattr(Hold{n}, 'k' + KEY{n})", ["globals()['KEY{n}'] = 'b'\nHold{n}.kb = {w}", "Hold{n}.ka = {w}"], top="KEY{n} = 'a'\nclass Hold{n}:\n    ka = {v}"),
    "zip": Home("dict(zip(KEYS{n}, VALUES{n}))['a']", ["VALUES{n}[0] = {w}", "KEYS{n}.reverse()\nVALUES{n}[1] = {w}"], top="KEYS{n} = ['a', 'b']\nVALUES{n} = [{v}, {v}]"),
    "annotations": Home("get_note{n}()", ["Hold{n}.__annotations__['k'] = {w}"], top="class Hold{n}:\n    k: int = 1\nHold{n}.__annotations__['k'] = {v}\ndef get_note{n}():\n    return Hold{n}.__annotations__['k']"),
    "class with slots": Home("O{n}.v", ["O{n}.v = {w}", "Slot{n}.v = property(lambda self: {w})"], top="class Slot{n}:\n    __slots__ = ('v',)\nO{n} = Slot{n}()\nO{n}.v = {v}"),
    "args": Home("take{n}(*ARGS{n}, **KW{n})", ["KW{n}['v'] = {w}", "ARGS{n}.append({w})"], top="ARGS{n} = []\nKW{n} = {{'v': {v}}}\ndef take{n}(*args, v=None):\n    return args[0] if args else v"),
    "config": Home("CFG{n}.train.weight", ["CFG{n}.train.weight = {w}", "CFG{n}.train = types.SimpleNamespace(weight={w})"], top="CFG{n} = types.SimpleNamespace(train=types.SimpleNamespace(weight={v}))"),
    "trainer": Home("TRAINER{n}.weight_now()", ["TRAINER{n}.weight = {w}", "Trainer{n}.weight_now = lambda self: {w}", "Trainer{n}.default = {w}\nvars(TRAINER{n}).pop('weight', None)"], top="class Trainer{n}:\n    default = {v}\n    def __init__(self):\n        self.weight = {v}\n    def weight_now(self):\n        return getattr(self, 'weight', self.default)\nTRAINER{n} = Trainer{n}()"),
    "weakref": Home("W{n}().value", ["O{n}.value = {w}"], top="O{n} = Caller({v})\nW{n} = weakref.ref(O{n})"),
    "deque": Home("Q{n}[0]", ["Q{n}[0] = {w}", "Q{n}.appendleft({w})"], top="Q{n} = deque([{v}], maxlen=3)"),
    "chain map": Home("Q{n}['a']", ["Q{n}['a'] = {w}", "Q{n}.maps[0]['a'] = {w}"], top="Q{n} = ChainMap({{}}, {{'a': {v}}})"),
    "mapping proxy": Home("Q{n}['a']", ["D{n}['a'] = {w}"], top="D{n} = {{'a': {v}}}\nQ{n} = types.MappingProxyType(D{n})"),
    "user dict": Home("Q{n}['a']", ["Q{n}['a'] = {w}"], top="Q{n} = UserDict(a={v})"),
    "context variable": Home("V{n}.get()", ["V{n}.set({w})"], top="V{n} = contextvars.ContextVar('v{n}', default={v})"),
    "thread local": Home("V{n}.value", ["V{n}.value = {w}"], top="V{n} = threading.local()\nV{n}.value = {v}"),
    "tensor attribute": Home("PARAM{n}.note", ["PARAM{n}.note = {w}"], top="PARAM{n} = torch.ones(())\nPARAM{n}.note = {v}"),
    "parameter attribute": Home("{m}.fc.weight.note{n}", ["model.fc.weight.note{n} = {w}"], init="self.fc.weight.note{n} = {v}"),
    "batch attribute": Home("batch.note{n}", ["BATCH['note{n}'] = {w}"], top="BATCH['note{n}'] = {v}"),
    "batch entry": Home("batch['entry{n}']", ["BATCH_ENTRIES['entry{n}'] = {w}"], top="BATCH_ENTRIES['entry{n}'] = {v}"),
    "attribute of batch tensor": Home("batch['x'].note{n}", ["BATCH_X['note{n}'] = {w}"], top="BATCH_X['note{n}'] = {v}"),
}

WRAPS = ["{r}"] * 12 + ["(lambda: {r})()", "ident(*({r},))", "ident(**{{'v': {r}}})", "[q for q in ({r},)][0]", "next(q for q in [{r}])", "(lambda q={r}: q)()", "twice_nested({r})", "list(map(ident, [{r}]))[0]", "(held := {r})", "functools.partial(ident, {r})()", "ident_any({r}, 1, k=2)"]

PRELUDE = '''
import abc, collections, contextlib, contextvars, copy, dataclasses, enum, functools, importlib, itertools, math, operator, os, sys, threading, types, weakref
from collections import ChainMap, OrderedDict, UserDict, defaultdict, deque
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

TABLE = [1.0, 2.0, 3.0, 4.0]
EXTRA, BATCH, BATCH_ENTRIES, BATCH_X = {}, {}, {}, {}

class Color(enum.Enum):
    RED = 1
    BLUE = 2

class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2

class Flag(enum.Flag):
    A = 1
    B = 2

class Target:
    attr_a = 1.0
    attr_b = 2.0
TARGET = Target()

class SubDict(dict):
    pass

class Alpha:
    factor = 2.0
class Beta(Alpha):
    pass
class Gamma(Alpha):
    factor = 3.0
class Registered(abc.ABC):
    pass
Registered.register(Beta)
THING = Gamma()

class Caller:
    def __init__(self, value):
        self.value = value
    def __call__(self, v):
        return v * 2.0
    def get(self):
        return self.value
    def call(self, v):
        return v * 3.0
    @classmethod
    def make(cls, v):
        return v * 1.5
    def __enter__(self):
        return self.value
    def __exit__(self, *error):
        pass

class Sized:
    size = 2
    def __len__(self):
        return self.size

@dataclasses.dataclass
class Point:
    x: object
    y: object
    @property
    def value(self):
        return self.x

@dataclasses.dataclass(frozen=True)
class Frozen:
    value: object

class Pair(collections.namedtuple("Pair", ["first", "second"])):
    @property
    def value(self):
        return self.first

class Slotted:
    __slots__ = ("value", "__weakref__")
    def __init__(self, value):
        self.value = value

class Lazy:
    def __init__(self, value):
        self.hidden = value
    @functools.cached_property
    def value(self):
        return self.hidden

class Descriptor:
    def __init__(self, scale):
        self.scale = scale
    def __get__(self, instance, owner):
        return instance.hidden if instance is not None else self
    def __set__(self, instance, value):
        instance.hidden = value

class Described:
    value = Descriptor(1)
    other = property(lambda self: 5.0)
    def __init__(self, value):
        self.hidden = value

class Getter:
    def __init__(self, value):
        self.table = {"value": value}
    def __getattr__(self, name):
        if name.startswith("__") or name == "table":
            raise AttributeError(name)
        return self.table[name] if name in self.table else super().__getattribute__(name)

class Deep:
    def __init__(self, value):
        self.value = value
    def __getattribute__(self, name):
        return object.__getattribute__(self, name)

def double(v):
    return v * 2.0
def double_again(v):
    return v + v + v
def negate(v):
    return -v
def ident(v):
    return v
def ident_any(v, *args, **kwargs):
    return v
def twice_nested(v):
    def one():
        def two():
            return v
        return two()
    return one()
def decorate(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)
    return wrapper

class DictBatch(dict):
    pass
'''

NETS = {
    "mlp": ("self.fc = nn.Linear(4, 6)\nself.act = nn.Tanh()\nself.head = nn.Linear(6, 3)", "h = self.act(self.fc(x))\nout = self.head(h)"),
    "dropout": ("self.fc = nn.Linear(4, 6)\nself.act = nn.Dropout(0.3)\nself.head = nn.Linear(6, 3)", "h = self.act(self.fc(x)).tanh()\nout = self.head(h)"),
    "batch norm": ("self.fc = nn.Linear(4, 6, bias=False)\nself.act = nn.BatchNorm1d(6)\nself.head = nn.Linear(6, 3)", "h = self.act(self.fc(x)).tanh()\nout = self.head(h)"),
    "layer norm": ("self.fc = nn.Linear(4, 6)\nself.act = nn.LayerNorm(6)\nself.head = nn.Linear(6, 3)", "h = F.gelu(self.act(self.fc(x)))\nout = self.head(h)"),
    "sequential": ("self.fc = nn.Linear(4, 6)\nself.act = nn.Tanh()\nself.head = nn.Linear(6, 3)\nself.body = nn.Sequential(self.fc, self.act, nn.Sequential(self.head))", "out = self.body(x)"),
    "list": ("self.fc = nn.Linear(4, 4)\nself.act = nn.Tanh()\nself.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(2)])\nself.head = nn.Linear(4, 3)", "h = self.fc(x)\nfor layer in self.layers:\n    h = h + self.act(layer(h))\nout = self.head(h)"),
    "conv": ("self.fc = nn.Conv1d(1, 2, 3, padding=1)\nself.act = nn.Tanh()\nself.head = nn.Linear(8, 3)", "h = self.act(self.fc(x.unsqueeze(1))).flatten(1)\nout = self.head(h)"),
    "gru": ("self.fc = nn.GRU(2, 3, batch_first=True)\nself.act = nn.Tanh()\nself.head = nn.Linear(3, 3)", "h = self.act(self.fc(x.view(-1, 2, 2))[0][:, -1])\nout = self.head(h)"),
    "attention": ("self.fc = nn.Linear(4, 4)\nself.act = nn.MultiheadAttention(4, 2, batch_first=True, bias=False)\nself.head = nn.Linear(4, 3)", "h = self.fc(x).unsqueeze(0)\nh = self.act(h, h, h, need_weights=False)[0].squeeze(0)\nout = self.head(h)"),
    "buffer": ("self.fc = nn.Linear(4, 6)\nself.act = nn.Tanh()\nself.register_buffer('mean', torch.zeros(6))\nself.register_buffer('count', torch.zeros((), dtype=torch.int64), persistent=False)\nself.head = nn.Linear(6, 3)", "h = self.fc(x)\nself.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)\nself.count += 1\nout = self.head(self.act(h - self.mean))"),
    "replaced buffer": ("self.fc = nn.Linear(4, 6)\nself.act = nn.Tanh()\nself.register_buffer('mean', torch.zeros(6))\nself.head = nn.Linear(6, 3)", "h = self.fc(x)\nself.mean = 0.9 * self.mean + 0.1 * h.detach().mean(0)\nout = self.head(self.act(h - self.mean))"),
    "tied": ("self.fc = nn.Linear(4, 4)\nself.act = nn.Tanh()\nself.mid = nn.Linear(4, 4)\nself.mid.weight = self.fc.weight\nself.head = nn.Linear(4, 3)", "h = self.act(self.mid(self.act(self.fc(x))))\nout = self.head(h)"),
    "parameter list": ("self.fc = nn.Linear(4, 6)\nself.act = nn.Tanh()\nself.weights = nn.ParameterList([torch.randn(6, 3), torch.randn(3)])\nself.table = nn.ParameterDict({'a': torch.randn(3)})\nself.head = nn.Identity()", "h = self.act(self.fc(x))\nout = self.head(h @ self.weights[0] + self.weights[1] * self.table['a'])"),
    "weight norm": ("self.fc = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))\nself.act = nn.Tanh()\nself.head = nn.Linear(6, 3)", "h = self.act(self.fc(x))\nout = self.head(h)"),
    "args": ("self.fc = nn.Linear(4, 6)\nself.act = nn.Tanh()\nself.head = nn.Linear(6, 3)", "layers = {name: child for name, child in self.named_children() if name != 'act'}\nh = x\nfor name, layer in layers.items():\n    h = self.act(layer(h)) if name == 'fc' else layer(h)\nout = h"),
    "state": ("self.fc = nn.Linear(4, 6)\nself.act = nn.Tanh()\nself.head = nn.Linear(6, 3)", "h = self.act(self.fc(x))\nout = self.head(h) + sum(p.square().sum() for p in self.parameters()) * 0.001 + sum(1 for n, _ in self.named_buffers()) * 0.1"),
}

OPTIMIZERS = ["torch.optim.SGD({p}, lr=0.05)", "torch.optim.SGD({p}, lr=0.05, momentum=0.9)", "torch.optim.SGD({p}, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)", "torch.optim.Adam({p}, lr=0.01)", "torch.optim.AdamW({p}, lr=0.01)", "torch.optim.Adam({p}, lr=0.01, amsgrad=True, weight_decay=0.01)", "torch.optim.RMSprop({p}, lr=0.01, momentum=0.5)", "torch.optim.Adagrad({p}, lr=0.05)", "torch.optim.Adamax({p}, lr=0.01)", "torch.optim.NAdam({p}, lr=0.01)", "torch.optim.RAdam({p}, lr=0.01)", "torch.optim.Adadelta({p}, lr=0.5)", "OwnSGD({p}, lr=0.05)", "OwnAdam({p}, lr=0.01)", "torch.optim.AdamW([{{'params': list(model.fc.parameters()), 'lr': 0.02}}, {{'params': [q for q in model.parameters() if all(q is not s for s in model.fc.parameters())]}}], lr=0.01)", "torch.optim.Adam({p}, lr=torch.tensor(0.01))", "torch.optim.SGD({p}, lr=0.05, maximize=True)", "torch.optim.Adam({p}, lr=0.01, betas=[0.8, 0.9])", "torch.optim.Rprop({p}, lr=0.01)", "torch.optim.ASGD({p}, lr=0.01)"]

OWN_OPTIMIZERS = '''
class OwnSGD(torch.optim.Optimizer):
    damp = 1.0
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"] * self.damp)

class OwnAdam(torch.optim.Adam):
    damp = 1.0
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(self.damp)
        return super().step(closure)
'''

QUIRKS = [
    "with torch.no_grad():\n    extra = out.square().mean()\nloss = loss + extra",
    "with torch.autocast('cpu', dtype=torch.bfloat16, enabled=False):\n    loss = loss + out.mean()",
    "torch.manual_seed(3)\nloss = loss + torch.rand(()) * 0.1",
    "loss = loss + torch.rand_like(out).mean() * 0.1",
    "loss = loss + torch.utils.checkpoint.checkpoint(model.head, h_of(model, x), use_reentrant=False).mean() if hasattr(model.head, 'in_features') and model.head.in_features == 6 else loss",
    "loss = loss + (0.1 if torch.is_grad_enabled() else 0.2)",
    "loss = loss + (0.1 if model.training else 0.2)",
    "loss = loss + torch.zeros(1).mean() + torch.full((), 0.5)",
    "loss = loss + torch.arange(3).double().mean() * torch.get_default_dtype().itemsize",
    "loss = loss + 0.1 * (torch.get_num_threads() > 100)",
    "loss = loss + (0.1 if torch.are_deterministic_algorithms_enabled() else 0.2)",
    "loss = loss + (0.1 if torch.is_anomaly_enabled() else 0.2)",
    "loss = loss + torch.ones(2, dtype=None).sum().double() / 3",
    "with torch.enable_grad():\n    loss = loss + out.square().mean()",
    "assert out.shape[0] == x.shape[0], 'rows'\nloss = loss + 0.01 * out.shape[0]",
    "loss = loss + sum(p.norm() for n, p in model.named_parameters() if 'weight' in n) * 0.01",
    "for name, buffer in model.named_buffers():\n    loss = loss + 0.01 * buffer.double().sum()",
    "loss = loss + 0.001 * len(list(model.modules())) + 0.002 * len(list(model.parameters()))",
    "loss = loss + 0.01 * sum(p.numel() for p in model.parameters() if p.requires_grad)",
    "loss = loss + model.head(torch.zeros_like(h_of(model, x))).mean() * 0.1 if hasattr(model.head, 'in_features') and model.head.in_features == 6 else loss",
    "loss = loss + 0.1 * float(model.fc.__class__.__name__ == 'Linear')",
    "loss = loss + 0.1 * float(torch.backends.mkldnn.enabled)",
    "loss = loss + 0.01 * OPT.param_groups[0]['lr']",
    "COUNTER['n'] = COUNTER.get('n', 0) + 1\nloss = loss + 0.01 * COUNTER['n']",
    "LOG.append(1.0)",
    "loss = loss + 0.01 * next(TICKS)",
    "loss = loss + 0.01 * RANDOM.random()",
    "loss = loss + 0.01 * np.random.rand()",
    "loss = loss + 0.01 * sys_random.random()",
    "model.seen = out",
    "STORE['last'] = out",
    "model.steps_seen = getattr(model, 'steps_seen', 0) + 1",
    "loss = loss + 0.01 * len(LOG)",
    "loss = loss + 0.1 * float(torch._C._get_tracing_state() is None)",
    "loss = loss + 0.01 * time_like()",
    "if x.requires_grad:\n    loss = loss * 2",
    "if x.is_contiguous():\n    loss = loss * 2",
    "loss = loss + torch.func.functional_call(model, {k: v for k, v in model.named_parameters()}, (x,)).mean() * 0.1",
    "loss = loss + 0.01 * float(x.device.type == 'cpu') + 0.01 * float(str(x.dtype) == 'torch.float64')",
    "loss = loss + 0.01 * float(isinstance(model.act, nn.Tanh))",
    "loss = loss + GLOBAL_TENSOR.mean()",
    "loss = loss + torch.where(GLOBAL_TENSOR > 1, 2.0, 1.0).mean()",
    "GLOBAL_TENSOR.add_(0.1)\nloss = loss + GLOBAL_TENSOR.mean()",
    "loss = loss + 0.1 * GLOBAL_MODULE(out).mean()",
    "x = x.mul_(0.9)\nloss = F.mse_loss(model(x), y.add_(0.1))", "y[0] = 0.0\nloss = F.mse_loss(model(x), y)", "x.requires_grad_()\nloss = loss + model(x).mean()",
    "loss = loss + torch.rand(3, generator=GENERATOR, dtype=x.dtype).mean()",
    "loss = loss + 0.01 * next(ITERATOR)", "loss = loss + 0.01 * next(GENERATED)", "list.append(LOG, 1.0)\nloss = loss + 0.01 * len(LOG)", "heapq.heappush(LOG, 1.0)", "operator.setitem(COUNTER, 'n', COUNTER.get('n', 0) + 1)\nloss = loss + 0.01 * COUNTER['n']",
    "TALLY.update(['a'])\nloss = loss + 0.01 * TALLY['a']", "RING.rotate(1)\nloss = loss + 0.01 * RING[0]", "vars(model)['n'] = vars(model).get('n', 0) + 1\nloss = loss + 0.01 * model.n", "globals()['N'] = globals().get('N', 0) + 1\nloss = loss + 0.01 * N", "Net.count_of_class = getattr(Net, 'count_of_class', 0) + 1\nloss = loss + 0.01 * Net.count_of_class", "forward.calls = getattr(forward, 'calls', 0) + 1\nloss = loss + 0.01 * forward.calls",
    "loss = loss + 0.01 * bump()", "loss = loss + 0.01 * bump_global()", "loss = loss + 0.01 * BUMPER.next()", "loss = loss + 0.01 * BUMPER.value\nBUMPER.value += 1", "loss = loss + 0.01 * BUMPER.counted",
    "sys_random.shuffle(SHUFFLED)\nloss = loss + 0.01 * SHUFFLED[0]", "loss = loss + 0.01 * float(np.random.default_rng(3).random())", "print('step')", "sys.stdout.write('step')", "QUEUE.put(1)\nloss = loss + 0.01 * QUEUE.qsize()", "VARIABLE.set(VARIABLE.get() + 1)\nloss = loss + 0.01 * VARIABLE.get()", "os.environ['FUZZ_N'] = str(int(os.environ.get('FUZZ_N', '0')) + 1)\nloss = loss + 0.01 * int(os.environ['FUZZ_N'])",
    "loss = loss + 0.1 * Scaled.apply(out).mean()", "loss = loss + 0.1 * Backward.apply(out).mean()", "loss = loss + Counted.apply(out).mean()",
    "loss = loss + torch.utils.checkpoint.checkpoint(lambda t: t.square().mean() * SCALES[0], out, use_reentrant=False)", "loss = loss + torch.vmap(lambda v: v.sum() * SCALES[0])(out).mean()", "loss = loss + allowed(out)", "loss = loss + scripted(out)", "out.register_hook(lambda g: g * SCALES[0])\nloss = loss + out.mean()", "loss.register_hook(lambda g: g * 2)", "out.retain_grad()", "OPT.zero_grad()",
    "loss = loss + torch.autograd.grad(out.sum(), model.head.weight, create_graph=True)[0].square().mean() if hasattr(model.head, 'weight') else loss",
    "buffer = io.StringIO()\nbuffer.write('a')\nloss = loss + 0.01 * len(buffer.getvalue())", "with torch.random.fork_rng():\n    loss = loss + torch.rand(()) * 0.1", "loss = loss + 0.1 * torch.get_rng_state()[0].double() / 256", "model.mean_of = loss.detach()", "KEPT.copy_(out.detach().mean())\nloss = loss + KEPT", "KEPT_LIST[0] = KEPT_LIST[0] + out.detach().mean()\nloss = loss + KEPT_LIST[0]", "KEPT_LIST.append(out)", "loss = loss + 0.1 * sum(t.mean() for t in KEPT_LIST)",
    "loss = loss + 0.1 * float(model.fc.weight._version > 100)", "loss = loss + 0.001 * float(model.head.weight.data_ptr() == 0) if hasattr(model.head, 'weight') else loss", "loss = loss + (0.1 if model.head.weight.grad is None else 0.5) if hasattr(model.head, 'weight') else loss", "loss = loss + 0.01 * len(OPT.state)", "loss = loss + 0.01 * len(OPT.param_groups)", "loss = loss + (model.head.weight - SHADOW).square().mean() if hasattr(model.head, 'weight') and model.head.weight.shape == SHADOW.shape else loss",
    "loss = loss + 0.1 * sum(p.mean() for p in OPT.param_groups[0]['params'])", "loss = loss + 0.1 * sum(s['exp_avg'].mean() for s in OPT.state.values() if 'exp_avg' in s)", "loss = torch.where(loss > 1e9, loss * float('nan'), loss)", "loss = loss + torch.sqrt((out * 0).sum())", "loss = loss + (out.mean() if threading.current_thread() is threading.main_thread() else 0.0)",
    "loss = loss + 0.01 * id(model) % 2 * 0", "loss = loss + 0.1 * hash('a') % 2 * 0", "loss = loss + 0.01 * float(cached(2.0))", "loss = loss + 0.01 * LAZY.value", "model.lazy = getattr(model, 'lazy', None) or 2.0\nloss = loss * model.lazy", "loss = loss + functools.reduce(operator.add, [p.sum() for p in model.parameters()]) * 0.01", "loss = loss + 0.01 * int(x.shape[0] * 1.5)", "loss = loss + 0.1 * torch.tensor(SCALES).sum()", "loss = loss + 0.1 * torch.as_tensor(ARRAY).sum()", "loss = loss + 0.1 * torch.from_numpy(ARRAY).sum()", "loss = loss + 0.1 * float(ARRAY[0])", "loss = loss + 0.1 * SHARED.sum()\nARRAY[0] += 1",
]

QUIRK_TOP = '''
import itertools, random as sys_random
from torch.utils import checkpoint as _checkpoint
COUNTER, LOG, STORE = {}, [], {}
TICKS = itertools.count()
RANDOM = sys_random.Random(5)
GLOBAL_TENSOR = torch.ones(3, dtype=torch.float64)
torch.manual_seed(99)
GLOBAL_MODULE = nn.Linear(3, 2).requires_grad_(False)
def h_of(model, x):
    return torch.ones(5, 6, dtype=x.dtype) * x.mean()
import heapq, io, queue
GENERATOR = torch.Generator().manual_seed(11)
ITERATOR = iter([float(i) for i in range(1000)])
GENERATED = (float(i) for i in range(1000))
TALLY = collections.Counter()
RING = deque([1.0, 2.0, 3.0])
SHUFFLED = [1.0, 2.0, 3.0, 4.0]
QUEUE = queue.Queue()
VARIABLE = contextvars.ContextVar('fuzz', default=0)
SCALES = [2.0, 3.0]
ARRAY = np.array([1.0, 2.0])
SHARED = torch.from_numpy(ARRAY)
KEPT = torch.zeros(())
KEPT_LIST = [torch.zeros(())]
SHADOW = torch.ones(3, 6)
N = 0
METRIC = {'scale': 2.0}
def metric(loss, out, y):
    return (out - y).abs().mean() * METRIC['scale']
class Criterion(nn.SmoothL1Loss):
    pass
CRITERION = Criterion()
def make_bump():
    count = 0
    def bump():
        nonlocal count
        count += 1
        return count
    return bump
bump = make_bump()
def bump_global():
    global N
    N += 1
    return N
class Bumper:
    def __init__(self):
        self.value = 0
    def next(self):
        self.value += 1
        return self.value
    @property
    def counted(self):
        self.value += 1
        return self.value
BUMPER = Bumper()
class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        return a * SCALES[0]
    @staticmethod
    def backward(ctx, g):
        return g * SCALES[1]
class Backward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        ctx.scale = SCALES[0]
        ctx.save_for_backward(a)
        return a.square()
    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0] * ctx.scale * double(1.0)
class Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a):
        return a * 1.0
    @staticmethod
    def backward(ctx, g):
        COUNTER['backward'] = COUNTER.get('backward', 0) + 1
        return g * COUNTER['backward']
@torch.compiler.allow_in_graph
def allowed(t):
    return t.mean() * SCALES[0]
@torch.jit.ignore
def _ignored(t):
    return t
import warnings
with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    @torch.jit.script
    def scripted(t):
        return t.mean() * 2
@functools.lru_cache
def cached(v):
    return v * SCALES[0]
class LazyValue:
    @functools.cached_property
    def value(self):
        return SCALES[0]
LAZY = LazyValue()
def time_like():
    return float(len(LOG))
'''

MODEL_CHANGES = [
    "model.fc.eval()", "model.act.eval()", "model.act.p = 0.6", "model.act.training = False", "model.eval()",
    "model.fc.requires_grad_(False)", "model.head.requires_grad_(False)", "model.fc.requires_grad_(True)", "next(model.parameters()).requires_grad_(False)",
    "model.fc.weight = nn.Parameter(model.fc.weight.detach() * 0.5)", "model.head.weight = nn.Parameter(model.head.weight.detach().clone())",
    "model.fc.weight.data = model.fc.weight.data * 0.5", "model.fc.weight.data = torch.randn_like(model.fc.weight)", "model.fc.weight.data.mul_(0.5)",
    "with torch.no_grad():\n    model.fc.weight.mul_(1.1)",
    "model.load_state_dict({k: v * 0.9 if v.is_floating_point() else v for k, v in model.state_dict().items()})",
    "model.load_state_dict({k: v.detach().clone() for k, v in model.state_dict().items()}, assign=True)",
    "opt.load_state_dict(copy.deepcopy(opt.state_dict()))", "opt.load_state_dict(opt.state_dict())",
    "model.float(); model.double()", "model.to(torch.float32).to(torch.float64)", "model.half(); model.double()",
    "opt.param_groups[0]['lr'] = 0.02", "for g in opt.param_groups:\n    g['lr'] *= 0.5", "opt.param_groups[0]['weight_decay'] = 0.1", "opt.param_groups[0]['weight_decay'] = 0",
    "opt.param_groups[0]['betas'] = (0.5, 0.6)", "opt.param_groups[0]['momentum'] = 0.5", "opt.param_groups[0]['momentum'] = 0.0", "opt.param_groups[0]['nesterov'] = False", "opt.param_groups[0]['eps'] = 0.1", "opt.param_groups[0]['maximize'] = True", "opt.param_groups[0]['amsgrad'] = False",
    "if 'betas' in opt.param_groups[0] and isinstance(opt.param_groups[0]['betas'], list):\n    opt.param_groups[0]['betas'][0] = 0.3",
    "opt.param_groups[0]['lr'] = torch.tensor(0.03)", "if torch.is_tensor(opt.param_groups[0]['lr']):\n    opt.param_groups[0]['lr'].fill_(0.2)",
    "opt.param_groups[0]['fused'] = False", "opt.param_groups[0]['foreach'] = True", "opt.defaults['lr'] = 5.0",
    "opt.state.clear()", "for s in opt.state.values():\n    for k, v in s.items():\n        if torch.is_tensor(v):\n            v.mul_(0.5)", "for s in opt.state.values():\n    for k, v in list(s.items()):\n        if torch.is_tensor(v):\n            s[k] = v * 0.5",
    "opt.param_groups[0]['params'].pop()", "opt.param_groups[0]['params'].reverse()",
    "model.extra_p = nn.Parameter(torch.ones(3)); opt.add_param_group({'params': [model.extra_p], 'lr': 0.1})",
    "model.register_parameter('late', nn.Parameter(torch.ones(())))", "model.register_buffer('lateb', torch.ones(2))",
    "torch.nn.Module.__setattr__(model, 'act', nn.ReLU())", "model.act = nn.Sigmoid()", "model.act = nn.Identity()",
    "model.act.register_forward_hook(lambda m, i, o: o * 1.5)", "model.fc.register_forward_hook(hook_out)", "model.fc.register_forward_pre_hook(lambda m, i: (i[0] * 0.5,))",
    "model.register_forward_hook(lambda m, i, o: o * 2)", "model.register_forward_pre_hook(lambda m, i: (i[0] * 0.9,))",
    "model.fc.register_full_backward_hook(lambda m, gi, go: None)", "model.head.register_full_backward_hook(lambda m, gi, go: tuple(None if g is None else g * 0.5 for g in gi))", "model.head.register_full_backward_pre_hook(lambda m, go: tuple(g * 0.5 for g in go))",
    "HANDLES.append(nn.modules.module.register_module_forward_hook(lambda m, i, o: o * 1.1 if isinstance(m, nn.Linear) else None))",
    "HANDLES.append(nn.modules.module.register_module_forward_pre_hook(lambda m, i: (i[0] * 1.1,) if isinstance(m, nn.Linear) else None))",
    "HANDLES.append(nn.modules.module.register_module_full_backward_hook(lambda m, gi, go: None))",
    "HANDLES.append(torch.optim.optimizer.register_optimizer_step_pre_hook(lambda o, a, k: [p.grad.mul_(0.5) for g in o.param_groups for p in g['params'] if p.grad is not None] and None))",
    "opt.register_step_pre_hook(lambda o, a, k: [p.grad.mul_(0.5) for g in o.param_groups for p in g['params'] if p.grad is not None] and None)", "opt.register_step_post_hook(lambda o, a, k: [p.data.mul_(0.99) for g in o.param_groups for p in g['params']] and None)",
    "next(model.parameters()).register_hook(lambda g: g * 2)", "next(model.parameters()).register_post_accumulate_grad_hook(lambda p: p.grad.mul_(0.5))",
    "for h in HANDLES:\n    h.remove()\nHANDLES.clear()",
    "model.forward = lambda x: model_head(x)", "model.forward = types.MethodType(lambda self, x: self.head(torch.zeros(x.shape[0], self.head.in_features, dtype=x.dtype)) if hasattr(self.head, 'in_features') else x[:, :3], model)",
    "model.fc.forward = types.MethodType(patched_linear, model.fc) if isinstance(model.fc, nn.Linear) else model.fc.forward",
    "Net.forward = other_forward", "Net.forward.__code__ = other_forward.__code__", "Net.__call__ = lambda self, x: nn.Module.__call__(self, x) * 2", "Net.helper = lambda self, h: h * 3", "model.helper = lambda h: h * 4", "Base.helper = lambda self, h: h * 5", "Net.helper.__code__ = (lambda self, h: h * 6).__code__",
    "model.__class__ = Net2", "model.act.__class__ = nn.ReLU", "model.fc.__class__ = MyLinear if isinstance(model.fc, nn.Linear) else type(model.fc)",
    "MyLinear.forward = lambda self, x: F.linear(x, self.weight) * 7",
    "model.head.weight = model.fc.weight if model.head.weight.shape == model.fc.weight.shape else model.head.weight", "model.mid.weight = nn.Parameter(model.mid.weight.detach().clone()) if hasattr(model, 'mid') else None",
    "model.layers.append(nn.Linear(4, 4))", "model.layers[0] = nn.Linear(4, 4)", "del model.layers[0]", "model.layers = nn.ModuleList([])",
    "model.mean = torch.ones(6)", "model.mean.fill_(0.5)", "model.mean.data = torch.ones(6)",
    "torch.nn.utils.parametrize.register_parametrization(model.head, 'weight', Halved())", "torch.nn.utils.parametrizations.weight_norm(model.head)", "torch.nn.utils.parametrizations.spectral_norm(model.head)", "torch.nn.utils.parametrizations.orthogonal(model.head)", "import torch.nn.utils.prune\ntorch.nn.utils.prune.l1_unstructured(model.head, 'weight', 2)", "torch.nn.utils.weight_norm(model.head)",
    "globals()['model_copy'] = copy.deepcopy(model)", "globals()['model_copy'] = copy.copy(model)", "copy.deepcopy(opt)", "globals()['pickled'] = len(__import__('pickle').dumps(model.state_dict()))",
    "torch.set_default_dtype(torch.float32)", "torch.set_num_threads(2)", "torch.use_deterministic_algorithms(True)", "torch.autograd.set_detect_anomaly(True)", "torch.set_grad_enabled(True)",
    "sys_random.seed(3); np.random.seed(3); torch.manual_seed(4)", "globals()['GLOBAL_TENSOR'] = torch.full((3,), 4.0)", "GLOBAL_TENSOR.fill_(5.0)", "GLOBAL_MODULE.weight.data.fill_(1.0)", "GLOBAL_MODULE.register_forward_hook(lambda m, i, o: o * 3)", "GLOBAL_MODULE.weight.requires_grad_(True)", "globals()['GLOBAL_MODULE'] = nn.Linear(3, 2).double().requires_grad_(False)", "GLOBAL_MODULE.bias = None",
    "LOG.append(1.0)", "COUNTER['n'] = 50", "SCALES[0] = 7.0", "SCALES[1] = 8.0", "SCALES[:] = [5.0, 6.0]", "globals()['SCALES'] = [9.0, 9.5]", "ARRAY[0] = 5.0", "globals()['ARRAY'] = np.array([4.0])", "Scaled.forward = staticmethod(lambda ctx, a: a * 11.0)", "Backward.backward = staticmethod(lambda ctx, g: g * 12.0)", "Scaled.backward = staticmethod(lambda ctx, g: g * 13.0)", "BUMPER.value = 100", "Bumper.next = lambda self: 40", "VARIABLE.set(9)", "KEPT.fill_(3.0)", "KEPT_LIST.append(torch.ones(()))", "globals()['KEPT_LIST'] = [torch.ones(())]", "SHADOW.copy_(torch.full((3, 6), 0.5))", "globals()['SHADOW'] = torch.zeros(3, 6)", "GENERATOR.manual_seed(5)", "for p in model.parameters():\n    p.grad = torch.ones_like(p)", "model.zero_grad()", "model.to(memory_format=torch.preserve_format)",
    "nn.Tanh.forward = lambda self, x: torch.sigmoid(x)", "F.mse_loss = lambda a, b: (a - b).abs().mean()", "torch.tanh = torch.sigmoid", "nn.Linear.forward = lambda self, x: F.linear(x, self.weight, self.bias) * 1.5", "F.linear = lambda x, w, b=None: x @ w.t()",
    "F.gelu = torch.relu", "nn.Dropout.forward = lambda self, x: x * 0.5", "nn.Module.__call__ = lambda self, *a, **k: self.forward(*a, **k) * 1.2", "nn.Module.named_parameters.__defaults__ = ('x', True, True)",
    "math.exp = math.sin", "globals()['sum'] = lambda *a: 5.0", "globals()['float'] = lambda *a: 7.0", "globals()['len'] = lambda *a: 4", "globals()['getattr'] = lambda *a: 0.75", "globals()['isinstance'] = lambda *a: True", "globals()['range'] = lambda *a: [1, 2]", "globals()['max'] = min", "globals()['list'] = tuple", "globals()['hasattr'] = lambda *a: False", "globals()['next'] = lambda *a: 0.5", "globals()['abs'] = lambda v: 3.0", "globals()['F'] = types.SimpleNamespace(**{**vars(torch.nn.functional), 'mse_loss': lambda a, b: (a - b).abs().sum()})", "globals()['ident'] = lambda v: (v, v)[0]", "globals()['math'] = types.SimpleNamespace(exp=math.cos, sin=math.sin, isnan=math.isnan, copysign=math.copysign)",
    "model.mid.weight.data = model.fc.weight.data if hasattr(model, 'mid') else model.head.weight.data", "model.layers[0].weight.data = model.fc.weight.data", "model.layers[0].weight.data = model.layers[1].weight.data", "model.layers[0].weight = model.layers[1].weight", "model.head.bias.data = model.head.weight.data.view(-1)[:3]", "model.mean.data = model.fc.bias.data", "GLOBAL_TENSOR.data = model.head.bias.data", "opt.state[model.head.weight] = {}", "model.head.weight.data = model.head.weight.data.float()",
    "metric.__code__ = (lambda loss, out, y: out.sum()).__code__", "METRIC['scale'] = 3.0", "globals()['METRIC'] = {'scale': 4.0}",
    "CRITERION.label_smoothing = 0.1", "CRITERION.weight = torch.tensor([1.0, 2.0, 3.0])", "CRITERION.reduction = 'sum'", "CRITERION.forward = lambda o, t: (o - t).square().mean() * 2", "type(CRITERION).forward = lambda self, o, t: (o - t).square().mean() * 3", "CRITERION.beta = 0.3", "CRITERION.register_forward_hook(lambda m, i, o: o * 2)",
    "model.fc.bias = None", "del model.fc.bias\nmodel.fc.bias = None", "model.fc.register_parameter('bias', None)", "model.head.in_features = 99", "model.fc.padding = (0,); model.fc.kernel_size = (1,)", "model.act.momentum = 0.9", "model.act.eps = 0.5", "model.act.track_running_stats = False", "model.act.reset_running_stats() if hasattr(model.act, 'reset_running_stats') else None", "model.act.running_mean = torch.ones(6)", "model.act.num_batches_tracked = None",
    "model.act.normalized_shape = (6,)", "model.act.inplace = True", "model.fc.flatten_parameters() if hasattr(model.fc, 'flatten_parameters') else None", "model.apply(lambda m: m.__dict__.__setitem__('tag', 1))", "model.requires_grad_(False); model.requires_grad_(True)", "model.share_memory()", "OwnSGD.damp = 0.5", "opt.damp = 0.25", "OwnSGD.step = lambda self, closure=None: None", "OwnAdam.damp = 0.5",
    "opt.__class__ = torch.optim.SGD if isinstance(opt, OwnSGD) else opt.__class__", "opt.step = lambda closure=None: None", "type(opt).step = type(opt).step", "opt.param_groups[0]['params'] = list(opt.param_groups[0]['params'])", "opt.param_groups.append(opt.param_groups.pop())", "opt.zero_grad = lambda set_to_none=True: None",
    "sched = torch.optim.lr_scheduler.StepLR(opt, 1, 0.5)\nopt._opt_called = True\nsched.step()",
]

MODEL_TOP = '''
HANDLES = []
class Halved(nn.Module):
    def forward(self, w):
        return w * 0.5
class MyLinear(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias) * 0.5
def hook_out(m, i, o):
    return o * 0.7 if torch.is_tensor(o) else None
def patched_linear(self, x):
    return F.linear(x, self.weight) * 2
def model_head(x):
    return x[:, :3] * 2
'''


NAMES = ["SCALES", "ARRAY", "SHARED", "GLOBAL_TENSOR", "GLOBAL_MODULE", "COUNTER", "LOG", "Scaled", "Backward", "BUMPER", "Bumper", "VARIABLE", "KEPT", "KEPT_LIST", "SHADOW", "GENERATOR", "named_buffers", "requires_grad"]
"""Of the quirks: what changes go with them."""


def indented(text: str, by: int) -> str:
    return "\n".join(" " * by + line if line else "" for line in text.split("\n"))


def draw_job(seed: int) -> Job:
    """The job of a seed."""
    rng = random.Random(seed)
    steps = rng.choice([5, 6, 7, 8])
    net_name = rng.choice(list(NETS))
    layers, body = NETS[net_name]
    optimizer = rng.choice(OPTIMIZERS) if rng.random() < 0.6 else rng.choice(OPTIMIZERS[:5])
    top: list[str] = []
    base: list[str] = []
    cls: list[str] = []
    init: list[str] = []
    in_net: list[str] = []
    in_forward: list[str] = []
    changes: list[Change] = []
    traits = [net_name, optimizer.partition("(")[0]]
    is_resident = rng.random() < 0.12
    needs_dict = False
    for n in range(rng.choice([0, 1, 1, 2, 2, 3])):
        kind_name = rng.choice(list(KINDS))
        home_name = rng.choice(list(HOMES))
        kind, home = KINDS[kind_name], HOMES[home_name]
        traits.append(f"{home_name}: {kind_name}")
        value = rng.choice(kind.values)

        def fill(text: str, model: str, value: str = value, new: str = "", n: int = n) -> str:
            return text.format(n=n, v=value, w=new, m=model)

        is_of_batch = home_name.startswith(("batch", "attribute of batch"))
        needs_dict = needs_dict or is_of_batch
        place = "forward" if is_of_batch or rng.random() < 0.6 else "net"
        name = "model" if place == "forward" else "self"
        top.append(fill(home.top, name))
        base.append(fill(home.base, name))
        cls.append(fill(home.cls, name))
        init.append(fill(home.init, name))
        read = rng.choice(WRAPS).format(r=fill(home.read, name))
        use = rng.choice(kind.uses).format(r=read)
        form = rng.choice(["loss = loss * (1.0 + 0.1 * ({u}))", "loss = loss + 0.1 * ({u}) * out.mean()", "loss = loss + ({u})"])
        if place == "forward":
            in_forward.append(form.format(u=use))
        else:
            in_net.append(f"out = out * (1.0 + 0.1 * ({use}))")
        for _ in range(rng.choice([1, 1, 2])):
            if kind.changes and rng.random() < 0.4:
                statement = rng.choice(kind.changes).format(r=fill(home.read, "model"))
                if "batch" in statement:
                    continue
            else:
                new = rng.choice([each for each in kind.values if each != value])
                statement = fill(rng.choice(home.sets), "model", new=new)
            changes.append(Change(rng.randrange(2, steps), statement))
    has_quirk = rng.random() < 0.45
    if has_quirk:
        quirk = rng.choice(QUIRKS)
        in_forward.append(quirk)
        traits.append("quirk")
        related = [each for each in MODEL_CHANGES if any(name in quirk and name in each for name in NAMES)]
        if related and rng.random() < 0.6:
            changes.append(Change(rng.randrange(2, steps), rng.choice(related)))
    for _ in range(rng.choice([0, 0, 1, 1, 2]) if top else rng.choice([1, 2])):
        changes.append(Change(rng.randrange(2, steps), rng.choice(MODEL_CHANGES)))
    changes.sort(key=lambda change: change.step)
    if needs_dict:
        is_resident = False
    source = _module(layers, body, optimizer, top, base, cls, init, in_net, in_forward, needs_dict)
    options: dict[str, object] = {"engine": rng.choice(["compiled"] * 4 + ["auto"])}
    if rng.random() < 0.2:
        options["accumulate"] = 2
    if rng.random() < 0.2:
        options["clip_norm"] = 0.5
    if rng.random() < 0.05:
        options["clip_value"] = 0.05
    if rng.random() < 0.15:
        options["metrics"] = "metric"
    if rng.random() < 0.1 and not in_forward and not needs_dict:
        options["loss"] = "CRITERION"
    return Job(seed, source, changes, steps, options, is_resident, rng.random() < 0.05, traits)


def _module(layers: str, body: str, optimizer: str, top: list[str], base: list[str], cls: list[str], init: list[str], in_net: list[str], in_forward: list[str], needs_dict: bool) -> str:
    take = "x, y = batch['x'], batch['y']" if needs_dict else "x, y = batch"
    made = (
        "batch = DictBatch(x=x, y=y, **BATCH_ENTRIES)\nfor name, value in BATCH.items():\n    setattr(batch, name, value)\nfor name, value in BATCH_X.items():\n    setattr(x, name, value)\nreturn batch"
        if needs_dict
        else "return x, y"
    )
    lines = "\n".join
    return f"""{PRELUDE}{OWN_OPTIMIZERS}{QUIRK_TOP}{MODEL_TOP}
{lines(top)}

class Base(nn.Module):
    def helper(self, h):
        return h
{indented(lines(each for each in base if each), 4)}

class Net(Base):
{indented(lines(each for each in cls if each), 4)}
    def __init__(self):
        super().__init__()
        self.extra = {{}}
{indented(layers, 8)}
{indented(lines(each for each in init if each), 8)}
    def __getattr__(self, name):
        if name.startswith("dyn") and name in self.__dict__.get("extra", {{}}):
            return self.extra[name]
        return super().__getattr__(name)
    def forward(self, x):
{indented(body, 8)}
        out = self.helper(out)
{indented(lines(in_net), 8)}
        return out

class Net2(Net):
    def forward(self, x):
        return super().forward(x) * 2

def other_forward(self, x):
    return (self.head.weight.mean() + x)[:, :3]

def forward(model, batch):
    {take}
    out = model(x)
    loss = F.mse_loss(out, y)
{indented(lines(in_forward), 4)}
    return loss, out, y

def make_batch(x, y, step):
{indented(made, 4)}

def build():
    global OPT
    torch.manual_seed(7)
    model = Net()
    OPT = opt = {optimizer.format(p="model.parameters()")}
    for group in opt.param_groups:
        group.update(EXTRA)
    return model, opt, forward
"""
