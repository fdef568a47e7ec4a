# ruff: noqa: E501
# fmt: off
"""Where a value that forward reads may stay, what it may be, and how it changes: the vocabulary of `fuzz_jobs`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["HOMES", "KINDS", "PRELUDE", "WRAPS", "Home", "Kind"]


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
    "method of list": Home("W{n}(0)", ["L{n}[0] = {w}", "globals()['W{n}'] = [{w}].__getitem__"], top="L{n} = [{v}]\nW{n} = L{n}.__getitem__"),
    "method of dict": Home("W{n}('k')", ["D{n}['k'] = {w}", "globals()['W{n}'] = {{'k': {w}}}.get"], top="D{n} = {{'k': {v}}}\nW{n} = D{n}.get"),
    "method of a class of Python's": Home("dict.get(D{n}, 'k')", ["D{n}['k'] = {w}"], top="D{n} = {{'k': {v}}}"),
    "operator": Home("operator.getitem(D{n}, 'k')", ["D{n}['k'] = {w}", "globals()['operator'] = types.SimpleNamespace(**{{**vars(operator), 'getitem': lambda d, k: {w}}})"], top="D{n} = {{'k': {v}}}"),
    "itemgetter": Home("A{n}(D{n})", ["D{n}['k'] = {w}", "globals()['A{n}'] = operator.itemgetter('z')\nD{n}['z'] = {w}"], top="D{n} = {{'k': {v}}}\nA{n} = operator.itemgetter('k')"),
    "partial in place": Home("P{n}()", ["P{n}.__setstate__((ident, ({w},), {{}}, {{}}))", "P{n}.__setstate__((lambda v: {w}, (1,), {{}}, {{}}))"], top="P{n} = functools.partial(ident, {v})"),
    "partial of partial": Home("P{n}()", ["Q{n}.keywords['v'] = {w}\nglobals()['P{n}'] = functools.partial(Q{n})", "P{n}.keywords['v'] = {w}"], top="Q{n} = functools.partial(ident, v={v})\nP{n} = functools.partial(Q{n})"),
    "partial attribute": Home("P{n}.value", ["P{n}.value = {w}"], top="P{n} = functools.partial(ident)\nP{n}.value = {v}"),
    "partial of method": Home("P{n}()", ["O{n}.value = {w}", "Caller.get = lambda self: {w}"], top="O{n} = Caller({v})\nP{n} = functools.partial(O{n}.get)"),
    "partialmethod": Home("O{n}.m()", ["Kept{n}.m = functools.partialmethod(Kept{n}.take, {w})", "Kept{n}.take = lambda self, v: {w}"], top="class Kept{n}:\n    def take(self, v):\n        return v\n    m = functools.partialmethod(take, {v})\nO{n} = Kept{n}()"),
    "dataclass default": Home("Made{n}().x", ["Made{n}.__init__.__defaults__ = ({w},)"], top="@dataclasses.dataclass\nclass Made{n}:\n    x: object = None\nMade{n}.__init__.__defaults__ = ({v},)"),
    "dataclass factory": Home("Made{n}().x", ["globals()['G{n}'] = {w}"], top="G{n} = {v}\n@dataclasses.dataclass\nclass Made{n}:\n    x: object = dataclasses.field(default_factory=lambda: G{n})"),
    "dataclass fields": Home("getattr(O{n}, dataclasses.fields(O{n})[0].name)", ["O{n}.x = {w}"], top="O{n} = Point({v}, 0)"),
    "dataclass as dict": Home("dataclasses.asdict(O{n})['x']", ["O{n}.x = {w}"], top="O{n} = Point({v}, 0)"),
    "dataclass compared": Home("({v} if O{n} == Point(1, 0) else ALT{n})", ["ALT{n}_ = 0\nglobals()['ALT{n}'] = {w}\nO{n}.x = 2", "globals()['ALT{n}'] = {w}\nPoint.__eq__ = lambda self, other: False"], top="O{n} = Point(1, 0)\nALT{n} = {v}"),
    "named tuple default": Home("Made{n}().first", ["Made{n}.__new__.__defaults__ = ({w},)"], top="Made{n} = collections.namedtuple('Made{n}', ['first'], defaults=[None])\nMade{n}.__new__.__defaults__ = ({v},)"),
    "named tuple class": Home("O{n}.first", ["Made{n}.first = property(lambda self: {w})", "globals()['O{n}'] = collections.namedtuple('Made{n}', ['second', 'first'])(1, {w})"], top="class Made{n}(collections.namedtuple('Made{n}', ['first'])):\n    pass\nO{n} = Made{n}({v})"),
    "typed named tuple": Home("O{n}.first", ["globals()['O{n}'] = Typed{n}({w})", "Typed{n}.first = property(lambda self: {w})"], top="import typing\nclass Typed{n}(typing.NamedTuple):\n    first: object\nO{n} = Typed{n}({v})"),
    "iter": Home("list(O{n})[0]", ["O{n}.v = {w}", "Kept{n}.__iter__ = lambda self: iter([{w}])"], top="class Kept{n}:\n    def __iter__(self):\n        return iter([self.v])\nO{n} = Kept{n}()\nO{n}.v = {v}"),
    "iter by generator": Home("[q for q in O{n}][0]", ["O{n}.v = {w}", "Kept{n}.__iter__ = lambda self: iter([{w}])"], top="class Kept{n}:\n    def __iter__(self):\n        yield self.v\nO{n} = Kept{n}()\nO{n}.v = {v}"),
    "contains": Home("({v} if 1 in O{n} else ALT{n})", ["globals()['ALT{n}'] = {w}\nKept{n}.__contains__ = lambda self, key: False", "globals()['ALT{n}'] = {w}\nO{n}.v = False"], top="class Kept{n}:\n    v = True\n    def __contains__(self, key):\n        return self.v\nO{n} = Kept{n}()\nALT{n} = {v}"),
    "truth": Home("({v} if O{n} else ALT{n})", ["globals()['ALT{n}'] = {w}\nKept{n}.__bool__ = lambda self: False", "globals()['ALT{n}'] = {w}\nO{n}.v = False"], top="class Kept{n}:\n    v = True\n    def __bool__(self):\n        return self.v\nO{n} = Kept{n}()\nALT{n} = {v}"),
    "truth that comes": Home("({v} if O{n} else ALT{n})", ["globals()['ALT{n}'] = {w}\nKept{n}.__bool__ = lambda self: False", "globals()['ALT{n}'] = {w}\nKept{n}.__len__ = lambda self: 0"], top="class Kept{n}:\n    pass\nO{n} = Kept{n}()\nALT{n} = {v}"),
    "equality": Home("({v} if O{n} == 1 else ALT{n})", ["globals()['ALT{n}'] = {w}\nKept{n}.__eq__ = lambda self, other: False", "globals()['ALT{n}'] = {w}\nO{n}.v = False"], top="class Kept{n}:\n    v = True\n    def __eq__(self, other):\n        return self.v\n    __hash__ = object.__hash__\nO{n} = Kept{n}()\nALT{n} = {v}"),
    "equality that comes": Home("({v} if O{n} == Q{n} else ALT{n})", ["globals()['ALT{n}'] = {w}\nKept{n}.__eq__ = lambda self, other: True\nglobals()['FLIP'] = 1"], top="class Kept{n}:\n    pass\nO{n}, Q{n} = Kept{n}(), Kept{n}()\nALT{n} = {v}"),
    "order": Home("({v} if O{n} < Q{n} else ALT{n})", ["globals()['ALT{n}'] = {w}\nO{n}.rank = 3", "globals()['ALT{n}'] = {w}\nKept{n}.__lt__ = lambda self, other: False"], top="@functools.total_ordering\nclass Kept{n}:\n    def __init__(self, rank):\n        self.rank = rank\n    def __lt__(self, other):\n        return self.rank < other.rank\nO{n}, Q{n} = Kept{n}(1), Kept{n}(2)\nALT{n} = {v}"),
    "sum of objects": Home("(O{n} + 1)", ["Kept{n}.__add__ = lambda self, other: {w}", "O{n}.v = {w}"], top="class Kept{n}:\n    def __add__(self, other):\n        return self.v\nO{n} = Kept{n}()\nO{n}.v = {v}"),
    "reflected sum": Home("(1 + O{n})", ["Kept{n}.__radd__ = lambda self, other: {w}", "O{n}.v = {w}"], top="class Kept{n}:\n    def __radd__(self, other):\n        return self.v\nO{n} = Kept{n}()\nO{n}.v = {v}"),
    "as index": Home("[{v}, ALT{n}][O{n}]", ["globals()['ALT{n}'] = {w}\nO{n}.at = 1", "globals()['ALT{n}'] = {w}\nKept{n}.__index__ = lambda self: 1"], top="class Kept{n}:\n    at = 0\n    def __index__(self):\n        return self.at\nO{n} = Kept{n}()\nALT{n} = {v}"),
    "as text": Home("D{n}[str(O{n})]", ["D{n}['b'] = {w}\nO{n}.text = 'b'", "D{n}['b'] = {w}\nKept{n}.__str__ = lambda self: 'b'"], top="class Kept{n}:\n    text = 'a'\n    def __str__(self):\n        return self.text\nO{n} = Kept{n}()\nD{n} = {{'a': {v}}}"),
    "key object": Home("D{n}[O{n}]", ["D{n}[O{n}] = {w}", "globals()['O{n}'] = Slotted(2)\nD{n}[O{n}] = {w}"], top="O{n} = Slotted(1)\nD{n} = {{O{n}: {v}}}"),
    "call of class": Home("Made{n}()", ["Meta{n}.__call__ = lambda cls: {w}", "Made{n}.v = {w}"], top="class Meta{n}(type):\n    def __call__(cls):\n        return cls.v\nclass Made{n}(metaclass=Meta{n}):\n    v = {v}"),
    "item of class": Home("Made{n}[0]", ["Made{n}.__class_getitem__ = classmethod(lambda cls, at: {w})", "Made{n}.v = {w}"], top="class Made{n}:\n    v = {v}\n    def __class_getitem__(cls, at):\n        return cls.v"),
    "new": Home("Made{n}().v", ["Made{n}.kept = {w}", "Made{n}.__init__ = lambda self: setattr(self, 'v', {w})"], top="class Made{n}:\n    kept = {v}\n    def __new__(cls):\n        made = object.__new__(cls)\n        made.v = cls.kept\n        return made"),
    "init": Home("Made{n}().v", ["Made{n}.__init__ = lambda self: setattr(self, 'v', {w})", "Made{n}.__init__.__defaults__ = ({w},)", "globals()['Made{n}'] = type('Other', (), {{'v': {w}}})"], top="class Made{n}:\n    def __init__(self, v=None):\n        self.v = v\nMade{n}.__init__.__defaults__ = ({v},)"),
    "class getattr": Home("Made{n}.v", ["Meta{n}.__getattr__ = lambda cls, name: {w}", "Made{n}.v = {w}", "Meta{n}.v = {w}"], top="class Meta{n}(type):\n    def __getattr__(cls, name):\n        return {v}\nclass Made{n}(metaclass=Meta{n}):\n    pass"),
    "inner class": Home("Outer{n}.Inner.v", ["Outer{n}.Inner.v = {w}", "Outer{n}.Inner = type('Inner', (), {{'v': {w}}})"], top="class Outer{n}:\n    class Inner:\n        v = {v}"),
    "own data descriptor": Home("O{n}.value", ["Own{n}.__get__ = lambda self, instance, owner: {w}", "vars(Kept{n})['value'].kept = {w}", "Kept{n}.value = {w}"], top="class Own{n}:\n    def __get__(self, instance, owner):\n        return self.kept\n    def __set__(self, instance, value):\n        self.kept = value\nclass Kept{n}:\n    value = Own{n}()\nO{n} = Kept{n}()\nO{n}.value = {v}"),
    "non-data descriptor": Home("O{n}.value", ["vars(O{n})['value'] = {w}", "vars(Kept{n})['value'].kept = {w}", "Own{n}.__set__ = lambda self, i, v: None\nvars(Kept{n})['value'].kept = {w}"], top="class Own{n}:\n    kept = {v}\n    def __get__(self, instance, owner):\n        return self.kept\nclass Kept{n}:\n    value = Own{n}()\nO{n} = Kept{n}()"),
    "descriptor of model": Home("{m}.held{n}", ["vars(Net)['held{n}'].kept = {w}", "Held{n}.__get__ = lambda self, instance, owner: {w}"], top="class Held{n}:\n    kept = {v}\n    def __get__(self, instance, owner):\n        return self.kept", cls="held{n} = Held{n}()"),
    "slots and class": Home("O{n}.value", ["vars(Slot{n})['other'].__set__(O{n}, 1)\nSlot{n}.value = Slot{n}.other\nO{n}.other = {w}", "Slot{n}.__getattribute__ = lambda self, name: {w}"], top="class Slot{n}:\n    __slots__ = ('value', 'other')\nO{n} = Slot{n}()\nO{n}.value = {v}"),
    "slot that is missing": Home("getattr(O{n}, 'value', {v})", ["O{n}.value = {w}"], top="class Slot{n}:\n    __slots__ = ('value',)\nO{n} = Slot{n}()"),
    "regular expression": Home("({v} if PATTERN{n}.match('aa') else ALT{n})", ["globals()['ALT{n}'] = {w}\nglobals()['PATTERN{n}'] = re.compile('b')"], top="import re\nPATTERN{n} = re.compile('a')\nALT{n} = {v}"),
    "array": Home("[{v}, ALT{n}][ARRAY{n}[0]]", ["globals()['ALT{n}'] = {w}\nARRAY{n}[0] = 1"], top="import array\nARRAY{n} = array.array('l', [0])\nALT{n} = {v}"),
    "bytearray": Home("[{v}, ALT{n}][BYTES{n}[0]]", ["globals()['ALT{n}'] = {w}\nBYTES{n}[0] = 1"], top="BYTES{n} = bytearray([0])\nALT{n} = {v}"),
    "memory view": Home("[{v}, ALT{n}][VIEW{n}[0]]", ["globals()['ALT{n}'] = {w}\nBYTES{n}[0] = 1"], top="BYTES{n} = bytearray([0])\nVIEW{n} = memoryview(BYTES{n})\nALT{n} = {v}"),
    "ctypes": Home("[{v}, ALT{n}][CELL{n}.value]", ["globals()['ALT{n}'] = {w}\nCELL{n}.value = 1"], top="import ctypes\nCELL{n} = ctypes.c_long(0)\nALT{n} = {v}"),
    "user list": Home("U{n}[0]", ["U{n}[0] = {w}", "U{n}.data = [{w}]"], top="U{n} = collections.UserList([{v}])"),
    "bisect": Home("[{v}, ALT{n}][bisect.bisect(L{n}, 1)]", ["globals()['ALT{n}'] = {w}\nL{n}.insert(0, 0)"], top="import bisect\nL{n} = []\nALT{n} = {v}"),
    "sort key": Home("[{v}, ALT{n}][sorted([0, 1], key=KEY{n})[0]]", ["globals()['ALT{n}'] = {w}\nglobals()['KEY{n}'] = lambda q: -q", "globals()['ALT{n}'] = {w}\nKEY{n}.__code__ = (lambda q: -q).__code__"], top="KEY{n} = lambda q: q\nALT{n} = {v}"),
    "any": Home("({v} if any(L{n}) else ALT{n})", ["globals()['ALT{n}'] = {w}\nL{n}[0] = False", "globals()['ALT{n}'] = {w}\nL{n}.clear()"], top="L{n} = [True]\nALT{n} = {v}"),
    "logger": Home("({v} if LOGGER{n}.isEnabledFor(10) else ALT{n})", ["globals()['ALT{n}'] = {w}\nLOGGER{n}.setLevel(20)"], top="import logging\nLOGGER{n} = logging.getLogger(__name__ + '{n}')\nLOGGER{n}.setLevel(10)\nALT{n} = {v}"),
    "logger level": Home("({v} if LOGGER{n}.level == 10 else ALT{n})", ["globals()['ALT{n}'] = {w}\nLOGGER{n}.setLevel(20)"], top="import logging\nLOGGER{n} = logging.getLogger(__name__ + '{n}')\nLOGGER{n}.setLevel(10)\nALT{n} = {v}"),
    "modules loaded": Home("({v} if 'fuzz_absent' not in sys.modules else ALT{n})", ["globals()['ALT{n}'] = {w}\nsys.modules['fuzz_absent'] = types.ModuleType('fuzz_absent')\nglobals()['GONE'] = sys.modules['fuzz_absent']"], top="ALT{n} = {v}"),
    "arguments of the process": Home("({v} if len(sys.argv) < 100 else ALT{n})", ["globals()['ALT{n}'] = {w}\nsys.argv.extend(['x'] * 100)\nglobals()['ADDED'] = 100"], top="ALT{n} = {v}"),
    "file": Home("({v} if not os.path.exists(FILE{n}) else ALT{n})", ["globals()['ALT{n}'] = {w}\nopen(FILE{n}, 'w').close()"], top="FILE{n} = os.path.join(os.path.dirname(__file__), __name__ + '{n}.flag')\nALT{n} = {v}"),
    "path object": Home("({v} if not FILE{n}.exists() else ALT{n})", ["globals()['ALT{n}'] = {w}\nFILE{n}.touch()"], top="import pathlib\nFILE{n} = pathlib.Path(__file__).with_name(__name__ + '{n}.flag')\nALT{n} = {v}"),
    "text of a file": Home("D{n}[Path(FILE{n}).read_text()]", ["D{n}['b'] = {w}\nPath(FILE{n}).write_text('b')"], top="FILE{n} = os.path.join(os.path.dirname(__file__), __name__ + '{n}.txt')\nPath(FILE{n}).write_text('a')\nD{n} = {{'a': {v}}}"),
    "thread name": Home("({v} if threading.current_thread().name == 'MainThread' else ALT{n})", ["globals()['ALT{n}'] = {w}\nthreading.current_thread().name = 'other'"], top="ALT{n} = {v}"),
    "decimal": Home("({v} if DECIMAL{n} > 1 else ALT{n})", ["globals()['ALT{n}'] = {w}\nglobals()['DECIMAL{n}'] = decimal.Decimal(0)"], top="import decimal\nDECIMAL{n} = decimal.Decimal(2)\nALT{n} = {v}"),
    "fraction": Home("({v} if FRACTION{n} > 1 else ALT{n})", ["globals()['ALT{n}'] = {w}\nFRACTION{n}._numerator = 0"], top="import fractions\nFRACTION{n} = fractions.Fraction(2)\nALT{n} = {v}"),
    "argument parser": Home("ARGS{n}.weight", ["ARGS{n}.weight = {w}", "vars(ARGS{n}).update(weight={w})"], top="import argparse\nARGS{n} = argparse.Namespace(weight={v})"),
    "dispatch of methods": Home("O{n}.m(THING)", ["Kept{n}.m.dispatcher.register(Gamma, lambda self, o: {w})", "vars(Kept{n})['m'].register(Alpha, lambda self, o: {w})"], top="class Kept{n}:\n    @functools.singledispatchmethod\n    def m(self, o):\n        return {v}\nO{n} = Kept{n}()"),
    "lazy global": Home("lazy{n}()", ["globals()['KEPT{n}'] = {w}", "KEPT{n}_ = 0\nglobals()['KEPT{n}'] = None\nglobals()['G{n}'] = {w}"], top="G{n} = {v}\nKEPT{n} = {v}\ndef lazy{n}():\n    return KEPT{n} if KEPT{n} is not None else G{n}"),
    "signature": Home("inspect.signature(f{n}).parameters['value'].default", ["f{n}.__defaults__ = ({w},)"], top="import inspect\ndef f{n}(value={v}):\n    pass"),
    "locals of a class body": Home("vars(Kept{n})['v']", ["Kept{n}.v = {w}"], top="class Kept{n}:\n    v = {v}"),
    "dict of object": Home("O{n}.__dict__['value']", ["O{n}.value = {w}", "O{n}.__dict__ = {{'value': {w}}}"], top="O{n} = Caller({v})"),
    "dict of class": Home("Kept{n}.__dict__['v']", ["Kept{n}.v = {w}"], top="class Kept{n}:\n    v = {v}"),
    "globals of a function": Home("helper{n}.__globals__['G{n}']", ["globals()['G{n}'] = {w}"], top="G{n} = {v}\ndef helper{n}():\n    return G{n}"),
    "code of a function": Home("helper{n}.__code__.co_consts[-1]", ["helper{n}.__code__ = (lambda: {w}).__code__"], top="def helper{n}():\n    return {v}"),
    "defaults of a function": Home("helper{n}.__defaults__[0]", ["helper{n}.__defaults__ = ({w},)"], top="def helper{n}(v={v}):\n    pass"),
    "cell contents": Home("get{n}.__closure__[0].cell_contents", ["put{n}({w})"], top=_GETTERS),
    "cached by object": Home("O{n}.cached()", ["O{n}.kept = {w}", "O{n}.kept = None\nO{n}.source = {w}"], top="class Kept{n}:\n    kept = None\n    def cached(self):\n        if self.kept is None:\n            return self.source\n        return self.kept\nO{n} = Kept{n}()\nO{n}.source = {v}\nO{n}.kept = {v}"),
    "module attribute by getattr": Home("getattr({m}, NAME{n})", ["globals()['NAME{n}'] = 'other{n}'\nmodel.other{n} = {w}", "model.first{n} = {w}"], top="NAME{n} = 'first{n}'", init="self.first{n} = {v}"),
    "module by name": Home("dict({m}.named_children())['fc'].a{n}", ["model.fc.a{n} = {w}"], init="self.fc.a{n} = {v}"),
    "get_submodule": Home("{m}.get_submodule(NAME{n}).a{n}", ["globals()['NAME{n}'] = 'act'\nmodel.act.a{n} = {w}", "model.fc.a{n} = {w}"], top="NAME{n} = 'fc'", init="self.fc.a{n} = {v}"),
    "extra state": Home("{m}.get_extra_state()['v']", ["model.set_extra_state({{'v': {w}}})", "model.state{n} = {{'v': {w}}}"], cls="def get_extra_state(self):\n    return self.state{n}\ndef set_extra_state(self, state):\n    self.state{n} = state", init="self.state{n} = {{'v': {v}}}"),
    "repr of module": Home("D{n}[len({m}.fc.extra_repr()) > 60]", ["D{n}[False] = {w}", "D{n}[True] = {w}\nmodel.fc.in_features = 10 ** 60"], top="D{n} = {{True: {v}, False: {v}}}"),
    "global of another module": Home("M{n}.get()", ["M{n}.value = {w}", "M{n}.get = lambda: {w}"], top="M{n} = sys.modules[__name__ + '_m{n}'] = types.ModuleType(__name__ + '_m{n}')\nexec('def get():\\n    return value', vars(M{n}))\nM{n}.value = {v}"),
    "builtin of another module": Home("M{n}.get()", ["M{n}.ident = lambda v: {w}", "M{n}.value = {w}"], top="M{n} = sys.modules[__name__ + '_m{n}'] = types.ModuleType(__name__ + '_m{n}')\nexec('def get():\\n    return tuple([value])[0]', vars(M{n}))\nM{n}.value = {v}"),
    "from import in a function": Home("imported{n}()", ["M{n}.value = {w}", "sys.modules[M{n}.__name__] = types.SimpleNamespace(value={w})"], top="M{n} = sys.modules[__name__ + '_m{n}'] = types.ModuleType(__name__ + '_m{n}')\nM{n}.value = {v}\ndef imported{n}():\n    return importlib.import_module(__name__ + '_m{n}').value"),
    "coroutine": Home("run{n}()", ["globals()['G{n}'] = {w}"], top="G{n} = {v}\nasync def later{n}():\n    return G{n}\ndef run{n}():\n    try:\n        later{n}().send(None)\n    except StopIteration as done:\n        return done.value"),
    "exit stack": Home("managed{n}()", ["O{n}.value = {w}", "Caller.__enter__ = lambda self: {w}"], top="O{n} = Caller({v})\ndef managed{n}():\n    with contextlib.ExitStack() as stack:\n        return stack.enter_context(O{n})"),
    "proxy of weakref": Home("W{n}.value", ["O{n}.value = {w}"], top="O{n} = Caller({v})\nW{n} = weakref.proxy(O{n})"),
    "weak dict": Home("W{n}[O{n}]", ["W{n}[O{n}] = {w}"], top="O{n} = Caller(1)\nW{n} = weakref.WeakKeyDictionary()\nW{n}[O{n}] = {v}"),
    "star of class": Home("(*L{n},)[-1]", ["L{n}.append({w})", "L{n}[:] = [{w}]"], top="L{n} = [{v}]"),
    "matched": Home("matched{n}()", ["O{n}.x = 5\nglobals()['ALT{n}'] = {w}", "Point.__match_args__ = ('y', 'x')\nglobals()['ALT{n}'] = {w}"], top="O{n} = Point(1, 2)\nALT{n} = {v}\ndef matched{n}():\n    match O{n}:\n        case Point(1, _):\n            return {v}\n        case _:\n            return ALT{n}"),
    "range": Home("[{v}, ALT{n}][len(RANGE{n}) - 1]", ["globals()['ALT{n}'] = {w}\nglobals()['RANGE{n}'] = range(2)"], top="RANGE{n} = range(1)\nALT{n} = {v}"),
    "dict view": Home("list(VIEW{n})[-1]", ["D{n}['b'] = {w}", "D{n}['a'] = {w}"], top="D{n} = {{'a': {v}}}\nVIEW{n} = D{n}.values()"),
    "default of a lambda in a partial": Home("P{n}.func()", ["P{n}.func.__defaults__ = ({w},)"], top="P{n} = functools.partial(lambda v={v}: v)"),
}

WRAPS = ["{r}"] * 12 + ["(lambda: {r})()", "ident(*({r},))", "ident(**{{'v': {r}}})", "[q for q in ({r},)][0]", "next(q for q in [{r}])", "(lambda q={r}: q)()", "twice_nested({r})", "list(map(ident, [{r}]))[0]", "(held := {r})", "functools.partial(ident, {r})()", "ident_any({r}, 1, k=2)"]

PRELUDE = '''
import abc, collections, contextlib, contextvars, copy, dataclasses, enum, functools, importlib, itertools, math, operator, os, sys, threading, types, weakref
from pathlib import Path
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
