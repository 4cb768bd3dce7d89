"""The integer recurrent ops against cells written with Python numbers, and their gradients."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_linger.ops import luna
from lightning_linger.ops.recurrent.arithmetic import (
    CELL_STEP,
    HiddenGrid,
    Product,
    curve_tables,
    curves_for,
    formats_of,
)
from lightning_linger.ops.recurrent.cells import Numbers, Weights
from lightning_linger.ops.recurrent.gradients import Layer, Parameters, run_layer
from lightning_linger.ops.recurrent.kernels import integer_gru, integer_lstm, integer_rnn
from tests.export import golden
from tests.ops.test_luna import rs, sat, sigmoid_model, tanh_model

CPU = torch.device("cpu")
KINDS = ("lstm", "gru", "rnn_tanh", "rnn_relu")
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
PLATFORMS = ("venusa", "arcs", "mars", "venus", "onnxruntime")
CURVES = {"mars": "arcs", "onnxruntime": "table"}


def tables_of(platform, rounding):
    return curve_tables(rounding, CPU) if platform == "onnxruntime" else None


# --- a layer in Python numbers ------------------------------------------------------------------


class Reference:
    """One direction of one layer; sums are Python integers, scales exact fractions."""

    def __init__(self, case):
        self.case = case
        self.curves = CURVES.get(case.platform, case.platform)
        self.wide = self.curves in ("arcs", "venusa")
        self.fraction, self.bits = (27, 32) if self.wide else (11, 16)
        if self.curves == "table":
            tables = curve_tables(case.rounding, CPU).tolist()
            self.sigmoid, self.tanh = (lambda x, t=t: t[x + 32768] for t in tables)
        else:
            out = luna.CURVES[self.curves].output_fraction - 15
            self.sigmoid = lambda x: sat(rs(sigmoid_model(x, self.curves), out), 16)
            self.tanh = lambda x: sat(rs(tanh_model(x, self.curves), out), 16)

    def nearest(self, units):
        """Round a fraction, or the double that a free scale gives."""
        if self.case.rounding == "half_up":
            return math.floor(units + Fraction(1, 2))
        return round(units)

    def ratio(self, *factors):
        """A quotient of steps: exact for powers of two, else in doubles from left to right."""
        first, *others, unit = factors
        total = first
        for factor in others:
            total = total * factor
        return total / unit

    def scaled(self, number, ratio):
        exact = math.frexp(ratio)[0] == 0.5
        return Fraction(number) * Fraction(ratio) if exact else float(number) * ratio

    def hidden(self, number, ratio):
        code = self.nearest(self.scaled(number, ratio))
        return max(self.case.low, min(self.case.high, code))

    def product(self, weights, bias, x, scale_x, scales):
        """``(accumulator, step)`` of each row."""
        rows = []
        for index, row in enumerate(weights):
            total = sum(a * b for a, b in zip(row, x, strict=True)) + (bias[index] if bias else 0)
            rows.append((total, scale_x, scales[index if len(scales) > 1 else 0]))
        return rows

    def gates(self, rows):
        unit = 2.0**-self.fraction
        moved = [self.nearest(self.scaled(t, self.ratio(sx, sw, unit))) for t, sx, sw in rows]
        return [sat(value, self.bits) for value in moved]

    def both(self, x, h):
        c = self.case
        return (
            self.product(c.ih, c.bias_ih, x, c.scale_x, c.scale_ih),
            self.product(c.hh, c.bias_hh, h, c.scale_o, c.scale_hh),
        )

    def sums(self, x, h):
        gx, gh = map(self.gates, self.both(x, h))
        return [sat(a + b, self.bits) for a, b in zip(gx, gh, strict=True)]

    def step(self, x, h, c):
        return getattr(self, self.case.kind)(x, h, c)

    def lstm(self, x, h, c):
        n = len(c)
        g = self.sums(x, h)
        i, f, o = ([self.sigmoid(v) for v in g[k * n : (k + 1) * n]] for k in (0, 1, 3))
        new = [self.tanh(v) for v in g[2 * n : 3 * n]]
        cells, products = [], []
        for k in range(n):
            kept, fresh = c[k] * f[k], i[k] * new[k]
            if self.wide:
                kept, fresh = sat(kept, 32), sat(fresh, 32)
                operand = rs(kept + fresh, 3)
                cells.append(rs(operand, 12))
            else:
                operand = sat(rs(kept + fresh, 19), 16)
                cells.append(sat(rs(kept + fresh, 15), 24))
            products.append(o[k] * self.tanh(operand))
        case = self.case
        if case.hr is None:
            return [self.hidden(p, self.ratio(2.0**-30, case.scale_o)) for p in products], cells
        narrow = [rs(p, 15) for p in products]
        rows = self.product(case.hr, None, narrow, CELL_STEP, case.scale_hr)
        return [self.hidden(t, self.ratio(a, b, case.scale_o)) for t, a, b in rows], cells

    def gru(self, x, h, c):
        gx, gh = map(self.gates, self.both(x, h))
        n, result = len(gx) // 3, []
        power = math.frexp(self.case.scale_o)[0] == 0.5
        d = max(15, -round(math.log2(self.case.scale_o))) if power else 15
        for k in range(n):
            r = self.sigmoid(sat(gx[k] + gh[k], self.bits))
            z = self.sigmoid(sat(gx[n + k] + gh[n + k], self.bits))
            m = self.tanh(sat(gx[2 * n + k] + rs(r * gh[2 * n + k], 15), self.bits)) << (d - 15)
            old = self.nearest(self.scaled(h[k], self.case.scale_o * 2.0**d))
            total = (m << 15) + z * (old - m)
            result.append(self.hidden(total, self.ratio(2.0 ** -(d + 15), self.case.scale_o)))
        return result, c

    def rnn_tanh(self, x, h, c):
        values = [self.tanh(g) for g in self.sums(x, h)]
        return [self.hidden(v, self.ratio(2.0**-15, self.case.scale_o)) for v in values], c

    def rnn_relu(self, x, h, c):
        pairs = zip(*self.both(x, h), strict=True)
        result = []
        for pair in pairs:
            total = sum(self.scaled(t, self.ratio(a, b, self.case.scale_o)) for t, a, b in pair)
            result.append(max(self.case.low, min(self.case.high, max(0, self.nearest(total)))))
        return result, c

    def run(self):
        """Outputs by sequence and time, and the last states by sequence."""
        case, outputs, last = self.case, {}, []
        for b in range(case.batch):
            times = [t for t, size in enumerate(case.sizes) if size > b]
            h, c = list(case.h[b]), list(case.c[b])
            for t in reversed(times) if case.reverse else times:
                h, c = self.step(case.x[t][b], h, c)
                outputs[t, b] = h
            last.append((h, c))
        return [outputs[t, b] for t, size in enumerate(case.sizes) for b in range(size)], last


class Drawn:
    """A layer drawn at random: codes as nested lists, scales as floats."""

    def __init__(self, seed, kind, platform, largest=3):
        r = self.r = random.Random(seed)
        self.kind, self.platform = kind, platform
        self.rounding = "half_even" if platform == "onnxruntime" else "half_up"
        free = platform == "onnxruntime" and r.random() < 0.7
        self.bits_x, self.bits_w, self.bits_o = (r.choice((2, 3, 4, 8, 16)) for _ in range(3))
        self.low, self.high = -(1 << (self.bits_o - 1)), (1 << (self.bits_o - 1)) - 1
        features, size = r.randint(1, largest), r.randint(1, largest)
        projected = kind == "lstm" and r.random() < 0.3
        outputs = r.randint(1, size) if projected else size
        rows = GATES[kind] * size
        self.batch, steps = r.randint(1, largest), r.randint(1, 4)
        self.sizes = [self.batch] * steps
        self.packed = r.random() < 0.4
        if self.packed:
            lengths = sorted((r.randint(1, steps) for _ in range(self.batch)), reverse=True)
            self.sizes = [sum(n > t for n in lengths) for t in range(lengths[0])]
        self.batch_first, self.reverse = r.random() < 0.5, r.random() < 0.5
        self.x = [[self.codes(features, self.bits_x) for _ in range(n)] for n in self.sizes]
        self.ih = [self.codes(features, self.bits_w) for _ in range(rows)]
        self.hh = [self.codes(outputs, self.bits_w) for _ in range(rows)]
        self.hr = [self.codes(size, self.bits_w) for _ in range(outputs)] if projected else None
        self.scale_x, self.scale_o = self.step(self.bits_x, free), self.step(self.bits_o, free)
        self.scale_ih, self.scale_hh, self.scale_hr = (
            [self.step(self.bits_w, free) for _ in range(n if r.random() < 0.5 else 1)]
            for n in (rows, rows, outputs)
        )
        self.bias_ih, self.bias_hh = (
            [r.randint(-(2**bits), 2**bits) for _ in range(rows)] if r.random() < 0.7 else None
            for bits in (r.choice((4, 12, 20, 31)) - 1 for _ in range(2))
        )
        self.h = [self.codes(outputs, self.bits_o) for _ in range(self.batch)]
        self.c = [[r.randint(-80000, 80000) for _ in range(size)] for _ in range(self.batch)]
        if r.random() < 0.5:
            self.h = [[0] * outputs for _ in self.h]
            self.c = [[0] * size for _ in self.c]

    def codes(self, count, bits):
        low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
        style = self.r.randint(0, 3)
        if style == 0:
            return [self.r.choice((low, high)) for _ in range(count)]
        if style == 1:
            return [0] * count
        return [self.r.randint(low, high) for _ in range(count)]

    def step(self, bits, free):
        exponent = self.r.randint(-bits - 3, 3 - bits)
        mantissa = self.r.uniform(0.5, 1) if free else 1.0
        return float(np.float32(math.ldexp(mantissa, exponent)))

    def tensors(self):
        def codes(values, bits):
            dtype = torch.int8 if bits <= 8 else torch.int16
            return None if values is None else torch.tensor(values, dtype=dtype)

        def biases(values):
            return None if values is None else torch.tensor(values, dtype=torch.int32)

        if self.packed:
            x = codes([row for step in self.x for row in step], self.bits_x)
        else:
            x = codes(self.x, self.bits_x)
            x = x.transpose(0, 1).contiguous() if self.batch_first else x
        return {
            "x": x,
            "h": codes(self.h, self.bits_o),
            "c": torch.tensor(self.c, dtype=torch.int32),
            "weight_ih": codes(self.ih, self.bits_w),
            "weight_hh": codes(self.hh, self.bits_w),
            "bias_ih": biases(self.bias_ih),
            "bias_hh": biases(self.bias_hh),
            "weight_hr": codes(self.hr, self.bits_w),
        }

    def run(self, fused=True, **changed):
        """The integer op: rows in order of time, and the last states."""
        given = self.tensors() | changed
        given |= {
            "tables": tables_of(self.platform, self.rounding),
            "batch_sizes": self.sizes if self.packed else [],
            "batch_first": self.batch_first,
            "reverse": self.reverse,
            "fused": fused,
            "rounding": self.rounding,
            "platform": self.platform,
        }
        for name in ("scale_x", "scale_ih", "scale_hh", "scale_o"):
            given[name] = getattr(self, name)
        for name in ("bits_x", "bits_w", "bits_o", "low", "high"):
            given[name] = getattr(self, name)
        if self.kind == "lstm":
            scale_hr = self.scale_hr if self.hr else []
            y, h, c = integer_lstm(**given, scale_hr=scale_hr)
        else:
            del given["c"], given["weight_hr"]
            c = None
            if self.kind == "gru":
                y, h = integer_gru(**given)
            else:
                y, h = integer_rnn(**given, nonlinearity=self.kind[4:])
        if not self.packed:
            y = (y.transpose(0, 1) if self.batch_first else y).reshape(-1, y.shape[-1])
        return y, h, c


seeds = st.integers(0, 2**32)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20, deadline=None)
@given(seed=seeds, fused=st.booleans())
def test_op_equals_python_numbers(kind, platform, seed, fused):
    drawn = Drawn(seed, kind, platform)
    rows, last = Reference(drawn).run()
    y, h, c = drawn.run(fused)
    assert y.tolist() == rows
    assert h.tolist() == [state for state, _ in last]
    if kind == "lstm":
        assert c.tolist() == [cell for _, cell in last]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(seed=seeds)
def test_fused_equals_step_by_step(kind, seed):
    drawn = Drawn(seed, kind, random.Random(seed).choice(PLATFORMS), largest=9)
    for a, b in zip(drawn.run(True), drawn.run(False), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@settings(max_examples=20, deadline=None)
@given(seed=seeds)
def test_real_initial_states_are_rounded_by_the_op(seed):
    drawn = Drawn(seed, "lstm", random.Random(seed).choice(PLATFORMS))
    codes = drawn.tensors()
    step = torch.tensor(drawn.scale_o)
    real = {"h": codes["h"].float() * step, "c": codes["c"].float() * CELL_STEP}
    for a, b in zip(drawn.run(), drawn.run(**real), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [n for n in golden.names() if n.startswith("lstm")])
def test_op_equals_the_engine(name):
    vector = golden.load(name)
    constants = [torch.from_numpy(np.array(a)) for a in vector_constants(vector)]
    (x,), (measured,) = vector.inputs.values(), vector.outputs.values()
    platform = name.rpartition("__")[2].lower()
    for run in range(vector.runs):
        for fused in (True, False):
            y, h, _ = integer_lstm(
                torch.from_numpy(x[run]),
                torch.zeros(1, 8),
                torch.zeros(1, 8),
                *constants,
                weight_hr=None,
                tables=None,
                batch_sizes=[],
                scale_x=1 / 16,
                scale_ih=[1 / 64],
                scale_hh=[1 / 64],
                scale_hr=[],
                scale_o=1 / 128,
                bits_x=8,
                bits_w=8,
                bits_o=8,
                low=-128,
                high=127,
                batch_first=True,
                reverse=False,
                fused=fused,
                rounding="half_up",
                platform=platform,
            )
            assert np.array_equal(y.numpy(), measured[run])
            assert torch.equal(h, y[:, -1])


def vector_constants(vector):
    from onnx.numpy_helper import to_array

    known = {tensor.name: to_array(tensor) for tensor in vector.model.graph.initializer}
    (node,) = [node for node in vector.model.graph.node if node.op_type == "LSTMInt"]
    return [known[name] for name in node.input[1:]]


# --- pieces -------------------------------------------------------------------------------------


@pytest.mark.parametrize("curves", ["arcs", "venusa"])
def test_straight_lines_equal_the_engine_kernels(curves):
    generator = torch.Generator().manual_seed(0)
    edges = [end for f in ("sigmoid", "tanh") for end, _, _ in luna.straight_lines(f, curves)]
    cells = range(-(2**31), 2**31, 2**24)
    ends = [v + d for v in (*edges, *cells, 0) for d in (-1, 0, 1)]
    x = torch.tensor([v for v in ends if -(2**31) <= v < 2**31])
    x = torch.cat([x, torch.randint(-(2**31), 2**31, (20000,), generator=generator)])
    quick = curves_for(curves, None, CPU)
    for name in ("sigmoid", "tanh"):
        exact = luna.to_fraction(getattr(luna, name)(x, curves), curves, 15)
        found = quick(x.view(-1, 1), quick.base((name,), 1))
        assert torch.equal(found.view(-1), exact)
        for fraction in (7, 15, 30):
            wide = torch.tensor([line(int(v), name, curves) for v in x[:400]])
            shifted = luna.saturate(luna.rounding_shift(wide, 58 - fraction), fraction + 1)
            kernel = luna.to_fraction(getattr(luna, name)(x[:400], curves), curves, fraction)
            assert torch.equal(shifted, kernel)


def line(x, name, curves):
    lines = luna.straight_lines(name, curves)
    _, slope, constant = next(found for found in lines if x <= found[0])
    return slope * x + constant


def test_only_32_bit_kernels_are_straight_lines():
    with pytest.raises(luna.ConfigError, match="no straight lines are called 'venus'"):
        luna.straight_lines("tanh", "venus")


def test_venus_and_table_curves_have_an_entry_per_code():
    codes = torch.arange(-(2**15), 2**15)
    for platform in ("venus", "onnxruntime"):
        quick = curves_for(platform, tables_of(platform, "half_even"), CPU)
        both = quick(torch.stack([codes, codes], 1), quick.base(("sigmoid", "tanh"), 1))
        for column, name in enumerate(("sigmoid", "tanh")):
            if platform == "venus":
                exact = luna.to_fraction(getattr(luna, name)(codes, "venus"), "venus", 15)
                assert torch.equal(both[:, column], exact)
                continue
            real = getattr(torch, name)(codes.double() * 2.0**-11) * 2.0**15
            rounded = real.round().clamp(-(2**15), 2**15 - 1)
            assert (both[:, column] - rounded).abs().max() <= 1


@pytest.mark.parametrize("bits", [8, 16])
def test_products_are_exact_at_the_extremes(bits):
    """A row that float32 cannot add up is added in float64."""
    most, features = 2 ** (bits - 1) - 1, 1100
    x, weight = torch.full((1, features), most), torch.full((2, features), most)
    weight[1] *= -1
    bias = torch.tensor([1, -1])
    found = Product(weight, bias, 1.0, [1.0], bits, bits, 1.0, "half_up").real(x)
    assert found.tolist() == [[features * most**2 + 1, -features * most**2 - 1]]


def test_cell_state_saturates():
    grown = Drawn(1, "lstm", "venusa")
    for platform, limit in (("venusa", 3 * 2**15), ("venus", 2**23), ("onnxruntime", 2**23)):
        grown.platform, grown.packed, grown.reverse = platform, False, False
        given = grown.tensors()
        c = torch.full_like(given["c"], 2**30)
        _, _, last = grown.run(c=c.clamp(max=2**23))
        assert last.abs().max() <= limit


# --- gradients ----------------------------------------------------------------------------------


class Bent(torch.autograd.Function):
    """A curve with a given value, and PyTorch's derivative at that value."""

    @staticmethod
    def forward(ctx, x, value, name):
        ctx.save_for_backward(value)
        ctx.name = name
        return value

    @staticmethod
    def backward(ctx, grad):
        (y,) = ctx.saved_tensors
        return grad * (y * (1 - y) if ctx.name == "sigmoid" else 1 - y * y), None, None


def ste(value, carrier):
    return carrier + (value - carrier).detach()


class Differentiable:
    """The float cell in autograd, every intermediate at the value of the integers."""

    def __init__(self, layer, parameters):
        self.layer, self.p = layer, parameters
        self.formats = formats_of(CURVES.get(layer.numbers.platform, layer.numbers.platform))
        self.curves = curves_for(layer.numbers.platform, layer.numbers.tables, CPU)
        self.unit = 2.0**-self.formats.gate_fraction
        self.grid = layer.numbers.hidden

    def curve(self, x, name):
        codes = (x.detach() / self.unit).round().long()
        value = self.curves(codes, self.curves.base((name,), codes.shape[1])).double() * CELL_STEP
        return Bent.apply(x, value, name)

    def gates(self, x, weight, bias):
        real = x @ weight.t() + (0 if bias is None else bias)
        return ste(self.rounded(real.detach() / self.unit) * self.unit, real)

    def rounded(self, units):
        bits = self.formats.gate_bits
        nearest = (units + 0.5).floor() if self.grid.rounding == "half_up" else units.round()
        return nearest.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)

    def saturated(self, x):
        bits = self.formats.gate_bits
        edge = 2.0 ** (bits - 1) * self.unit
        return ste(x.detach().clamp(-edge, edge - self.unit), x)

    def shifted(self, x, fraction):
        return ste(torch.floor(x.detach() * 2.0**fraction + 0.5) * 2.0**-fraction, x)

    def hidden(self, x):
        g = self.grid
        limited = x.clamp(g.low * g.scale, g.high * g.scale)
        units = x.detach() / g.scale
        nearest = (units + 0.5).floor() if g.rounding == "half_up" else units.round()
        return ste(nearest.clamp(g.low, g.high) * g.scale, limited)

    def step(self, x, h, c):
        p, kind = self.p, self.layer.kind
        if kind == "rnn_relu":
            real = x @ p.ih.t() + h @ p.hh.t()
            for bias in (p.bias_ih, p.bias_hh):
                real = real if bias is None else real + bias
            return self.hidden(torch.relu(real)), None
        gx, gh = self.gates(x, p.ih, p.bias_ih), self.gates(h, p.hh, p.bias_hh)
        if kind == "rnn_tanh":
            return self.hidden(self.curve(self.saturated(gx + gh), "tanh")), None
        if kind == "gru":
            x_r, x_z, x_n = gx.chunk(3, 1)
            h_r, h_z, h_n = gh.chunk(3, 1)
            r = self.curve(self.saturated(x_r + h_r), "sigmoid")
            z = self.curve(self.saturated(x_z + h_z), "sigmoid")
            reset = self.shifted(r * h_n, self.formats.gate_fraction)
            n = self.curve(self.saturated(x_n + reset), "tanh")
            return self.hidden(n + z * (h - n)), None
        i, f, g, o = self.saturated(gx + gh).chunk(4, 1)
        i, f, o = (self.curve(v, "sigmoid") for v in (i, f, o))
        kept = f * c
        limit = self.formats.product_limit
        if math.isfinite(limit):
            kept = kept.clamp(-limit, limit - 2.0**-30)
        total = kept + i * self.curve(g, "tanh")
        operand = self.saturated(self.shifted(total, self.formats.gate_fraction))
        wide = self.formats.gate_fraction > 15
        after = self.shifted(operand if wide else total, 15)
        product = o * self.curve(operand, "tanh")
        if p.hr is not None:
            product = self.shifted(product, 15) @ p.hr.t()
        return self.hidden(product), after

    def run(self, rows, states):
        h, c = (*states, None)[:2]
        sizes, outputs = self.layer.batch_sizes, {}
        pieces = rows.split(sizes)
        last = []
        for b in range(sizes[0]):
            times = [t for t, n in enumerate(sizes) if n > b]
            now = (h[b : b + 1], None if c is None else c[b : b + 1])
            for t in reversed(times) if self.layer.reverse else times:
                now = self.step(pieces[t][b : b + 1], *now)
                outputs[t, b] = now[0]
            last.append(now)
        y = torch.cat([outputs[t, b] for t, n in enumerate(sizes) for b in range(n)])
        ends = [torch.cat([state[k] for state in last]) for k in range(len(states))]
        return y, tuple(ends)


def differentiable(drawn):
    """A drawn layer as real values that want gradients."""
    t = drawn.tensors()
    rows = t["x"] if drawn.packed else torch.tensor(drawn.x).flatten(0, 1)
    leaves = {"rows": rows.double() * drawn.scale_x, "h": t["h"].double() * drawn.scale_o}
    if drawn.kind == "lstm":
        leaves["c"] = t["c"].double() * CELL_STEP
    for name, x_step in (("ih", drawn.scale_x), ("hh", drawn.scale_o), ("hr", CELL_STEP)):
        codes, steps = t[f"weight_{name}"], torch.tensor(getattr(drawn, f"scale_{name}"))
        if codes is None:
            continue
        steps = steps.double()
        leaves[name] = codes.double() * steps.view(-1, 1)
        bias = t.get(f"bias_{name}")
        if bias is not None:
            leaves[f"bias_{name}"] = bias.double() * steps * x_step
    return {name: value.clone().requires_grad_() for name, value in leaves.items()}


def layer_of(drawn):
    t = drawn.tensors()
    weights = Weights(
        t["weight_ih"].double(),
        t["weight_hh"].double(),
        t["bias_ih"],
        t["bias_hh"],
        None if t["weight_hr"] is None else t["weight_hr"].double(),
        drawn.scale_ih,
        drawn.scale_hh,
        drawn.scale_hr if drawn.hr else [],
        drawn.bits_w,
    )
    grid = HiddenGrid(drawn.scale_o, drawn.low, drawn.high, drawn.rounding)
    tables = tables_of(drawn.platform, drawn.rounding)
    numbers = Numbers(drawn.scale_x, drawn.bits_x, drawn.bits_o, grid, drawn.platform, tables)
    return Layer(drawn.kind, weights, numbers, drawn.sizes, drawn.reverse, True)


def drawn_for_gradients(seed, kind, platform):
    """Power-of-two scales and moderate codes, so that doubles hold every product."""
    for attempt in range(1000):
        drawn = Drawn(f"{seed} {attempt}", kind, platform)
        scales = (drawn.scale_x, drawn.scale_o, *drawn.scale_ih, *drawn.scale_hh, *drawn.scale_hr)
        if all(math.frexp(scale)[0] == 0.5 for scale in scales):
            return drawn
    raise AssertionError


@pytest.mark.parametrize("platform", ["venusa", "venus", "onnxruntime"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None)
@given(seed=seeds)
def test_gradient_is_that_of_the_float_cell_at_the_integers(kind, platform, seed):
    drawn = drawn_for_gradients(seed, kind, platform)
    layer = layer_of(drawn)
    results = []
    for run in (run_ours, run_reference):
        leaves = differentiable(drawn)
        parameters = Parameters(*(leaves.get(n) for n in ("ih", "hh", "bias_ih", "bias_hh", "hr")))
        states = tuple(leaves[n] for n in ("h", "c") if n in leaves)
        y, ends = run(layer, leaves["rows"], states, parameters)
        generator = torch.Generator().manual_seed(seed)
        outputs = [y, *ends]
        cotangents = [
            torch.randn(o.shape, generator=generator, dtype=torch.float64) for o in outputs
        ]
        grads = torch.autograd.grad(outputs, list(leaves.values()), cotangents)
        results.append((outputs, dict(zip(leaves, grads, strict=True))))
    (mine, found), (reference, expected) = results
    for a, b in zip(mine, reference, strict=True):
        assert torch.equal(a, b)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-9, atol=1e-9, msg=name)


def run_ours(layer, rows, states, parameters):
    return run_layer(layer, rows, states, parameters)


def run_reference(layer, rows, states, parameters):
    return Differentiable(layer, parameters).run(rows, states)


@pytest.mark.parametrize("kind", KINDS)
def test_fused_and_stepwise_gradients_are_equal(kind):
    drawn = drawn_for_gradients(3, kind, "venusa")
    found = []
    for fused in (True, False):
        leaves, layer = differentiable(drawn), layer_of(drawn)
        layer.fused = fused
        parameters = Parameters(*(leaves.get(n) for n in ("ih", "hh", "bias_ih", "bias_hh", "hr")))
        states = tuple(leaves[n] for n in ("h", "c") if n in leaves)
        y, _ = run_layer(layer, leaves["rows"], states, parameters)
        found.append(
            torch.autograd.grad(y.square().sum(), list(leaves.values()), allow_unused=True)
        )
    for a, b in zip(*found, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_no_gradient_passes_a_saturated_hidden_state():
    """A hidden state of two codes is at its end for any gate that is open."""
    drawn = drawn_for_gradients(0, "rnn_relu", "venusa")
    drawn.scale_o, drawn.low, drawn.high = 2.0**-20, 0, 1
    drawn.bias_ih, drawn.bias_hh = [2**20] * len(drawn.ih), None
    leaves, layer = differentiable(drawn), layer_of(drawn)
    parameters = Parameters(*(leaves.get(n) for n in ("ih", "hh", "bias_ih", "bias_hh", "hr")))
    y, _ = run_layer(layer, leaves["rows"], (leaves["h"],), parameters)
    assert (y == drawn.scale_o).all()
    for grad in torch.autograd.grad(y.sum(), list(leaves.values()), allow_unused=True):
        assert grad is None or not grad.any()
