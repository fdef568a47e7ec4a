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
import re
from dataclasses import dataclass, field

from tests.step.fuzz_homes import HOMES, KINDS, PRELUDE, WRAPS

__all__ = ["Change", "Job", "draw_job"]


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
        is_one_epoch: whether all steps are one epoch, the changes being made by what gives the batches.
        has_thread: whether another thread works meanwhile.
    """

    seed: int
    source: str
    changes: list[Change]
    steps: int
    options: dict[str, object] = field(default_factory=dict[str, object])
    is_resident: bool = False
    is_one_epoch: bool = False
    has_thread: bool = False
    traits: list[str] = field(default_factory=list[str])

    def recipe(self) -> str:
        """All of it, to read."""
        changes = "\n".join(f"# before step {each.step}: {each.statement}" for each in self.changes)
        more = f"# options {self.options}, resident {self.is_resident}, one epoch {self.is_one_epoch}, thread {self.has_thread}, {self.steps} steps"
        return f"# seed {self.seed}\n{self.source}\n{changes}\n{more}\n# {', '.join(self.traits)}\n"


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

OPTIMIZERS = ["torch.optim.SGD({p}, lr=0.05)", "torch.optim.SGD({p}, lr=0.05, momentum=0.9)", "torch.optim.SGD({p}, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01)", "torch.optim.Adam({p}, lr=0.01)", "torch.optim.AdamW({p}, lr=0.01)", "torch.optim.Adam({p}, lr=0.01, amsgrad=True, weight_decay=0.01)", "torch.optim.RMSprop({p}, lr=0.01, momentum=0.5)", "torch.optim.Adagrad({p}, lr=0.05)", "torch.optim.Adamax({p}, lr=0.01)", "torch.optim.NAdam({p}, lr=0.01)", "torch.optim.RAdam({p}, lr=0.01)", "torch.optim.Adadelta({p}, lr=0.5)", "OwnSGD({p}, lr=0.05)", "OwnAdam({p}, lr=0.01)", "torch.optim.AdamW([{{'params': list(model.fc.parameters()), 'lr': 0.02}}, {{'params': [q for q in model.parameters() if all(q is not s for s in model.fc.parameters())]}}], lr=0.01)", "torch.optim.Adam({p}, lr=torch.tensor(0.01))", "torch.optim.SGD({p}, lr=0.05, maximize=True)", "torch.optim.Adam({p}, lr=0.01, betas=[0.8, 0.9])", "torch.optim.Rprop({p}, lr=0.01)", "torch.optim.ASGD({p}, lr=0.01)", "torch.optim.Adam({p}, lr=0.01, amsgrad=True)", "torch.optim.Adam({p}, lr=0.01, fused=True)", "torch.optim.SGD(list({p})[1:], lr=0.05, momentum=0.9)", "torch.optim.Adam(list({p})[:-1], lr=0.01)", "OwnDrawn({p}, lr=0.05)"]

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

class OwnDrawn(OwnSGD):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-group["lr"] * drawn_scale())

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
    *(f"loss = loss + (0.1 if {asked} else 0.2)" for asked in ("torch.is_autocast_enabled('cpu')", "torch.get_autocast_dtype('cpu') == torch.bfloat16", "torch.backends.cudnn.benchmark", "torch.backends.cuda.matmul.allow_tf32", "torch.get_float32_matmul_precision() == 'highest'", "torch.backends.mha.get_fastpath_enabled()", "torch.compiler.is_compiling()", "torch.jit.is_tracing()", "torch.is_inference_mode_enabled()", "torch.utils.deterministic.fill_uninitialized_memory", "len(vars(TARGET)) > 0", "len(sys.argv) > 90", "GLOBAL_TENSOR.dtype == torch.float64", "GLOBAL_TENSOR.shape[0] == 3", "GLOBAL_TENSOR.is_contiguous()", "y.is_contiguous()", "y.dtype == torch.float64", "y.storage_offset() == 0", "x.data_ptr() == y.data_ptr()", "x.requires_grad")),
    "with torch.autograd.graph.saved_tensors_hooks(lambda t: t * 2, lambda t: t):\n    loss = loss + out.square().mean()", "with torch.autograd.graph.save_on_cpu():\n    loss = loss + out.square().mean()",
    "torch._assert((GLOBAL_TENSOR > -3).all(), 'small')\nloss = loss + GLOBAL_TENSOR.mean()", "with torch.no_grad():\n    model.fc.weight.mul_(0.99)" , "model.head.weight.data.clamp_(-0.4, 0.4) if hasattr(model.head, 'weight') else None", "out.data.mul_(2.0)\nloss = loss + out.mean()", "out.sum().backward(retain_graph=True)", "loss = loss + F.dropout(out, 0.5).mean()", "loss = loss + torch.bernoulli(torch.full_like(out, 0.5)).mean() * out.mean()", "loss = loss + out[torch.randperm(out.shape[0])][0].mean()", "loss = loss + torch.normal(0.0, 1.0, (3,)).mean()", "loss = loss + torch.randint(0, 5, (3,)).double().mean()", "loss = loss - torch.distributions.Normal(torch.zeros(()), torch.ones(()), validate_args=False).log_prob(out).mean() * 0.1",
    "loss = loss.detach().requires_grad_()", "loss = loss + torch.func.grad(lambda t: t.square().sum())(out).mean()", "LOGGER.info('step')", "warnings.warn('step')", "torch.manual_seed(model.training)", "loss = loss + x.as_subclass(Marked).mean()", "model.eval()\nmodel.train()",
    "loss = loss * (torch.ones(()) if COUNTER.get('n', 0) < 10 else torch.zeros(()))", "loss = loss + sum(q.mean() for q in vars(model)['_parameters'].values()) + sum(q.mean() for q in model._buffers.values())", "loss = loss + sum(len(m._forward_hooks) for m in model.modules()) * 0.01",
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
class Marked(torch.Tensor):
    pass
import logging
RECORDS = []
class Recording(logging.Handler):
    def emit(self, record):
        RECORDS.append(record.getMessage())
LOGGER = logging.Logger('fuzz', 10)
LOGGER.addHandler(Recording())
RESHAPE = [lambda x, y: (x, y)]
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

RESHAPED = ["(x.t().contiguous().t(), y)", "(x[:3], y[:3])", "(x[:0], y[:0])", "(x, y.float())", "(x.requires_grad_(), y)", "(x, x[:, :3])", "(torch.stack([x, x])[1], y)", "(x[:1].expand(5, 4), y)", "(nn.Parameter(x), y)", "(x.as_subclass(Marked), y)", "(x, GLOBAL_TENSOR.expand(5, 3))", "(x, OPT.param_groups[0]['params'][0].data.reshape(-1)[:3].expand(5, 3))", "(x * float('nan'), y)", "(x.to_sparse(), y)", "(x.repeat(1, 2)[:, ::2], y)"]
"""Batches of another shape, layout or kind."""

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
    "model.fc.weight.data = model.fc.weight.data.transpose(0, -1).contiguous().transpose(0, -1)", "model.head.weight.data = model.head.weight.data.repeat(1, 2)[:, ::2]", "model.head.bias.data = torch.ones(6)[::2]", "model.head.bias.data = torch.ones(4)[1:]", "model.head.bias.data = torch.ones(1).expand(3)", "model.mean.data = torch.ones(12)[::2]", "GLOBAL_TENSOR.data = torch.ones(6)[::2]", "GLOBAL_TENSOR.data = torch.ones(5)", "GLOBAL_TENSOR.data = GLOBAL_TENSOR.data.float()", "globals()['GLOBAL_TENSOR'] = torch.ones(3, dtype=torch.float32)", "GLOBAL_TENSOR.fill_(-5.0)", "for s in opt.state.values():\n    for k, v in list(s.items()):\n        if torch.is_tensor(v) and v.dim() == 2:\n            s[k] = v.t().contiguous().t()",
    "for p in model.head.parameters():\n    p.grad = torch.full_like(p, 3.0)", "opt.param_groups[0]['params'] = opt.param_groups[0]['params'][:-1]", "opt.param_groups[0]['params'].insert(0, opt.param_groups[0]['params'].pop())", "opt.param_groups[0]['amsgrad'] = True", "opt.param_groups[0]['fused'] = True", "opt.__setstate__(copy.deepcopy(opt.__getstate__()))", "model.fc = copy.deepcopy(model.fc)", "model.head = copy.copy(model.head)", "vars(model).update(vars(copy.deepcopy(model)))", "globals()['STORE'] = {'state': copy.deepcopy(model.state_dict())}", "copy.deepcopy((model, opt))",
    "torch.set_autocast_enabled('cpu', True)", "torch.set_autocast_dtype('cpu', torch.float16)", "torch.backends.cudnn.benchmark = True", "torch.backends.cuda.matmul.allow_tf32 = True", "torch.set_float32_matmul_precision('high')", "torch.backends.mha.set_fastpath_enabled(False)", "torch.backends.mkldnn.set_flags(False)", "torch.use_deterministic_algorithms(True, warn_only=True)", "torch.utils.deterministic.fill_uninitialized_memory = False", "torch.set_default_device('cpu')",
    "vars(TARGET)['later'] = 1", "sys.argv.extend(['more'] * 99)", "LOGGER.setLevel(40)", "Marked.mean = lambda self: torch.ones(())",
    "model._modules['act'] = nn.ReLU()", "model._modules = dict(model._modules)", "model._modules = {**model._modules, 'act': nn.ReLU()}", "model.fc._parameters['weight'] = nn.Parameter(model.fc.weight.detach() * 0.5)", "model._buffers['mean'] = torch.ones(6)", "model.fc._forward_hooks[999] = hook_out", "model.fc._forward_hooks = type(model.fc._forward_hooks)({999: hook_out})", "nn.modules.module._global_forward_hooks[999] = lambda m, i, o: o * 1.2", "model.fc.weight.requires_grad = False", "model.cpu(); model.to('cpu')", "model.type(torch.float64)", "model.mean.requires_grad_(True)",
    "torch.Tensor.tanh = torch.Tensor.sigmoid", "torch.Tensor.square = torch.Tensor.abs", "torch.optim.SGD.step = lambda self, closure=None: [p.data.mul_(0.9) for g in self.param_groups for p in g['params']] and None", "sys.modules['torch.optim.sgd'].sgd = lambda params, *a, **k: [p.mul_(0.9) for p in params] and None", "nn.Module.train = lambda self, mode=True: self", "nn.Module.parameters = lambda self, recurse=True: iter([])",
    *(f"RESHAPE[0] = lambda x, y: {made}" for made in RESHAPED),
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


NAMES = ["TARGET", "LOGGER", "Marked", "autocast", "cudnn", "allow_tf32", "mha", "sys.argv", "fill_uninitialized", "SCALES", "ARRAY", "SHARED", "GLOBAL_TENSOR", "GLOBAL_MODULE", "COUNTER", "LOG", "Scaled", "Backward", "BUMPER", "Bumper", "VARIABLE", "KEPT", "KEPT_LIST", "SHADOW", "GENERATOR", "named_buffers", "requires_grad"]
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
    is_resident = rng.random() < 0.18
    is_one_epoch = not is_resident and rng.random() < 0.2
    drawn_scale = "1.0"
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
        is_of_optimizer = "OwnDrawn" in optimizer and "{m}" not in home.read and not is_of_batch
        if is_of_optimizer:
            place = "optimizer"
        name = "model" if place == "forward" else "self"
        top.append(fill(home.top, name))
        base.append(fill(home.base, name))
        cls.append(fill(home.cls, name))
        init.append(fill(home.init, name))
        read = rng.choice(WRAPS).format(r=fill(home.read, name))
        without_batch = [each for each in kind.uses if not re.search(r"\b(x|out)\b", each)]
        use = rng.choice(without_batch if is_of_optimizer else kind.uses).format(r=read)
        form = rng.choice(["loss = loss * (1.0 + 0.1 * ({u}))", "loss = loss + 0.1 * ({u}) * out.mean()", "loss = loss + ({u})"])
        if is_of_optimizer:
            drawn_scale = f"1.0 + 0.1 * float({use})"
        elif place == "forward":
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
    top.append(f"def drawn_scale():\n    return {drawn_scale}")
    is_one_epoch = is_one_epoch and not is_resident
    source = _module(layers, body, optimizer, top, base, cls, init, in_net, in_forward, needs_dict)
    options: dict[str, object] = {"engine": rng.choice(["compiled"] * 4 + ["auto"])}
    if rng.random() < (0.05 if is_resident else 0.2):
        options["accumulate"] = 2
    if rng.random() < 0.2:
        options["clip_norm"] = 0.5
    if rng.random() < 0.05:
        options["clip_value"] = 0.05
    if rng.random() < 0.15:
        options["metrics"] = "metric"
    if rng.random() < 0.1 and not in_forward and not needs_dict:
        options["loss"] = "CRITERION"
    return Job(seed, source, changes, steps, options, is_resident, is_one_epoch, rng.random() < 0.05, traits)


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
    x, y = RESHAPE[0](x, y)
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
