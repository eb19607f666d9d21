"""Pieces of programs of hostile targets, as text: what they do, return, and are.

`tests/check/fuzz_targets.py` puts them together. The first of RETURNS, OUTPUTS and OBJECTS is
right.
"""

from __future__ import annotations

PROGRAM = """\
import asyncio, atexit, builtins, ctypes, functools, gc, os, resource, signal, subprocess, sys
import threading, time, traceback, unittest.mock, warnings
import torch
import torch.distributed as dist
from torch import Tensor, nn
from spmd_moe import CP, DP, TP, Placed, R, V
from spmd_moe.check import Case

Rows = Placed[Tensor, DP[V], CP[V], TP[V]]


def to_the_checker(junk):
    for fd in range(3, 64):
        path = f"/proc/self/fd/{{fd}}"
        if os.path.lexists(path) and "socket" in os.readlink(path):
            os.write(fd, junk)


class Mute:
    def __repr__(self):
        return 1 / 0


class MuteError(Exception):
    def __str__(self):
        return 1 / 0


class OddError(BaseException):
    __str__ = __repr__ = MuteError.__str__


{at_import}


class Module(nn.Module):
    weight: Placed[Tensor, DP[R], CP[R], TP[R]]

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 8))
        {at_init}

    def backward(self):
        {at_backward}

    def forward(self, x):
        y = nn.functional.linear(x, self.weight)
        y.register_hook(lambda gradient: self.backward())
        {at_forward}
        return {output}


def target(mesh, tokens):
    {at_target}
    module, x = Module(), torch.ones(mesh[TP].rank + 1, 8)
    return {returned}
"""

RAISES = (
    "raise RuntimeError",
    "raise RuntimeError('two\\nlines\\n  why: not this\\n  at:  nowhere:1')",
    "raise RuntimeError('bell \\x07 escape \\x1b[2J \\x00 \\ud83d \\u2028 \\u00e9 <b>&amp; ]]>')",
    "raise RuntimeError('x' * 10_000_000)",
    "raise MuteError",
    "raise type('Odd\\n name \\ud83d', (Exception,), {})('text')",
    "raise type('NotText', (Exception,), {'__str__': lambda self: 3})",
    "raise ExceptionGroup('several', [KeyError(1), ExceptionGroup('more', [OSError(2)])])",
    "raise StopIteration",
    "raise MemoryError",
    "raise 3",
    "bytearray(1 << 60)",
    "(lambda f: f(f))(lambda f: f(f))",
    "raise KeyError(None) from KeyError('cause')",
    "raise AssertionError",
    "raise subprocess.CalledProcessError(3, ['x'])",
    "raise UnicodeDecodeError('utf8', b'\\xff', 0, 1, 'odd')",
    "import no_such_module",
    "eval('1 +')",
    "torch.ones(3) @ torch.ones(4)",
    "assert_never = undefined_name",
    "torch.ones(2).no_such_attribute",
)
LEAVES = (
    "sys.exit(0)",
    "sys.exit('text')",
    "sys.exit([[]])",
    "exit()",
    "raise KeyboardInterrupt",
    "raise GeneratorExit",
    "raise asyncio.CancelledError",
    "raise type('Odd', (BaseException,), {})('odd')",
    "raise OddError(3)",
    "raise SystemExit(unittest.mock.Mock())",
    "raise SystemExit(Mute())",
)
DIES = (
    "os._exit(0)",
    "os._exit(1)",
    "os.kill(os.getpid(), signal.SIGKILL)",
    "os.kill(os.getpid(), signal.SIGTERM)",
    "os.abort()",
    "ctypes.string_at(0)",
    "os.execv('/bin/true', ['true'])",
    "os.killpg(0, signal.SIGKILL)",
    "os.kill(os.getpid(), signal.SIGALRM)",
)
LOOPS = (
    "while True: pass",
    "time.sleep(1000)",
    "threading.Event().wait()",
    "(lambda lock: lock.acquire() and lock.acquire())(threading.Lock())",
    "os.kill(os.getpid(), signal.SIGSTOP)",
    "signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65)); time.sleep(1000)",
    "subprocess.run(['sleep', '1000'])",
    "[signal.signal(n, signal.SIG_IGN) for n in (2, 10, 14, 15)]; time.sleep(1000)",
    "sum(1 for _ in iter(int, 1))",
)
PRINTS = (
    "print('{' * 100_000)",
    "os.write(1, b'[' * 10_000)",
    "print('\\x1b[2J\\x00', file=sys.stderr)",
    "sys.stdout.write('no end of line')",
    "sys.stdout.close()",
    "sys.__stdout__.write('x')",
    "warnings.warn('careful')",
    "traceback.print_stack()",
    "subprocess.run(['echo', 'from a child'])",
    "threading.Thread(target=lambda: print('later' * 100)).start()",
    "threading.Thread(target=time.sleep, args=(1000,)).start()",
    "atexit.register(print, 'at the end')",
    "sys.stdin.read()",
    "print(ascii(builtins), flush=True)",
)
# What the process of the target may do to itself. Whatever comes of it: a true status.
STATES = (
    "os.closerange(3, 4096)",
    "os.closerange(0, 3)",
    "to_the_checker(b'junk' * 99)",
    "to_the_checker(bytes(8))",
    "to_the_checker(bytes(7) + b'\\x02{}')",
    "to_the_checker(b'\\xff' * 8)",
    "sys.stdout = sys.stderr = None",
    "sys.modules.clear()",
    "sys.setrecursionlimit(60)",
    "sys.settrace(lambda *a: 1 / 0)",
    "signal.alarm(1)",
    "signal.signal(signal.SIGCHLD, signal.SIG_IGN)",
    "os.environ.clear(); os.chdir('/')",
    "resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))",
    "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))",
    "resource.setrlimit(resource.RLIMIT_CPU, (1, 1)); [None for _ in range(10 ** 9)]",
    "torch.set_default_device('meta')",
    "torch.set_default_dtype(torch.float64)",
    "torch.set_grad_enabled(False)",
    "torch.use_deterministic_algorithms(True)",
    "torch.Tensor.__repr__ = lambda self: 1 / 0",
    "torch.manual_seed = None",
    "nn.Module.__call__ = lambda self, *args: 3",
    "nn.Module.named_parameters = lambda self: iter(int, 1)",
    "dist.destroy_process_group()",
    "dist.get_rank = lambda *a: 7",
    "dist.barrier()",
    "os._exit = lambda status: None",
    "os.getpid = lambda: 1 << 23",
    "time.monotonic = lambda: -1.0",
    "builtins.len = None",
    "builtins.isinstance = lambda *a: True",
    "gc.disable(); builtins.print = None",
    "os.fork()",
    "Case.__init__ = lambda self, *args: None",
    "warnings.simplefilter('error'); warnings.warn('now an error')",
    "asyncio.get_event_loop_policy()",
)
RETURNS = (
    "Case(module, (x,), (Rows,))",
    "None",
    "Case",
    "module",
    "lambda *args: Case(module, (x,), (Rows,))",
    "(module, x)",
    "x",
    "Case(module, (), ())",
    "Case(module, (3, 'x'), (Rows, Rows))",
    "Case(module, x, Rows)",
    "Case(module, (x,), (Rows,) * 100)",
    "Case(module, (x,), (3,))",
    "Case(module, (x,), (Placed,))",
    "Case(module, (x,), ('dp 0',))",
    "Case(module, (x,), (unittest.mock.Mock(),))",
    "Case(None, (x,), (Rows,))",
    "Case(Module, (x,), (Rows,))",
    "Case(module, (x.to('meta'),), (Rows,))",
    "Case(module.to('meta'), (x,), (Rows,))",
    "Case(module, {x}, (Rows,))",
    "Case(module, iter([x]), (Rows,))",
    "Case(module, None, None)",
    "Case(unittest.mock.Mock(), (x,), (Rows,))",
    "unittest.mock.Mock()",
    "type('Liar', (), {'__class__': Case})()",
    "(i for i in range(3))",
    "Case()",
    "Case(module, (x,), (Rows,), nonsense=3)",
)
OUTPUTS = (
    "y",
    "None",
    "'text'",
    "[y, (y, {'a': y})]",
    "(lambda a: a.append(a) or a)([y])",
    "y.new_tensor(float('nan')).expand(3) + y.sum()",
    "y.to(torch.complex64)",
    "y.to_sparse()",
    "y > 0",
    "y.detach()",
    "y.to('meta')",
    "y.numpy(force=True)",
    "nn.Parameter(y.detach())",
    "self",
    "iter([y])",
    "unittest.mock.Mock()",
    "y[:0]",
    "y.sum().item()",
    "y.expand(1 << 20, *y.shape)[0]",
    "torch.empty(0)",
    "self(x) if x.shape[0] > 99 else y.unbind()",
    "{y: y}",
    "y.as_subclass(type('Own', (Tensor,), {}))",
    "y.to(torch.float8_e4m3fn)",
    "torch.nested.nested_tensor([y])",
)
OBJECTS = (
    "",
    "target = 3",
    "target = None",
    "target = unittest.mock.Mock()",
    "target = unittest.mock.MagicMock()",
    "target = functools.partial(target)",
    "target = functools.partial(target, 1, 2, 3)",
    "target = functools.lru_cache(target)",
    "target = staticmethod(target)",
    "target = property(target)",
    "target = type('Target', (), {'__call__': staticmethod(target)})()",
    "target = type('Target', (), {'__call__': None})()",
    "target = type('Target', (), {'__getattr__': lambda s, n: 1 / 0, '__call__': lambda *a: 3})()",
    "target = type('Own', (), {'func': property(lambda s: s), '__call__': lambda s, m, n: 3})()",
    "target = Module",
    "target = Module()",
    "target = len",
    "target = print",
    "target = lambda mesh, tokens, more: None",
    "target = lambda *, mesh, tokens: None",
    "target.__signature__ = 3",
    "target.__wrapped__ = target",
    "target.__qualname__ = 'odd \\ud83d\\n name'",
    "target.__module__ = None",
    "target.__name__ = 'x' * 10_000",
    "async def target(mesh, tokens): return None",
    "def target(mesh, tokens): yield 3",
    "Module.__module__ = 'no.such.module'",
    "Module.__qualname__ = Module.__name__ = '\\x1b[2J \\ud83d'",
    "Module.__annotations__ = {'weight': 'no such name'}",
    "Module.__getattr__ = lambda self, name: 1 / 0",
    "Module.__mro_entries__ = 3; Module.parameters = None",
    "__name__ = 3",
    "__file__ = None",
    "def __getattr__(name): raise SystemExit(name)\ndel target",
    "__dict__ = vars = None\ndel target",
)
