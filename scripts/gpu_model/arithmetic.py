"""What instructions do that only compute: each becomes a Python expression that works on the rows of all lanes.

A function with @means(...) gives the expression for the instructions of these names; `mask` in it are the lanes that take part.
What is not known, an instruction or a modifier, raises Unsupported.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from operands import PT, RZ, Operands, number, predicate, register

MEANINGS: dict[str, Callable[[Operands], str]] = {}


def means(*names: str):
    def add(function: Callable[[Operands], str]) -> Callable[[Operands], str]:
        MEANINGS.update(dict.fromkeys(names, function))
        return function

    return add


def logic(table: int, a: str, b: str, c: str) -> str:
    """The bitwise function of three that a table of eight bits says."""
    known = {0xC0: f"{a} & {b}", 0xFC: f"{a} | {b}", 0x3C: f"{a} ^ {b}", 0x30: f"{a} & ~{b}", 0x33: f"~{b}",
             0x80: f"{a} & {b} & {c}", 0xFE: f"{a} | {b} | {c}", 0x96: f"{a} ^ {b} ^ {c}", 0xF8: f"{a} | {b} & {c}",
             0x00: f"{a} & ~{a}", 0xFF: f"{a} | ~{a}", 0xCA: f"{a} & {b} | ~{a} & {c}", 0xF0: a, 0xCC: b, 0xAA: c}  # fmt: skip
    terms = [
        " & ".join(x if i & bit else f"~{x}" for x, bit in ((a, 4), (b, 2), (c, 1)))
        for i in range(8)
        if table >> i & 1
    ]
    return f"({known.get(table) or ' | '.join(terms)})"


# ---- integers --------------------------------------------------------------------------------------------------------


@means("MOV", "UMOV")
def move(o: Operands) -> str:
    o.allow("64")
    if o.ins.modifiers:
        return o.write_pair(o.texts[0], o.w(o.texts[1]))
    return o.write(o.texts[0], o.u(o.texts[1]))


@means("IMAD", "UIMAD")
def multiply_add(o: Operands) -> str:
    how = o.allow("MOV", "U32", "IADD", "SHL", "X", "WIDE", "HI")
    to, carry, rest = o.texts.pop(0), o.take_predicate(), o.texts
    carried = f" + {o.p(rest[3])}" if len(rest) > 3 else ""
    if how & {"WIDE", "HI"}:
        if carried:
            raise o.unsupported("a carry into a wide product")
        one, kind = (o.u, "u64") if "U32" in how else (o.i, "i64")
        product = f"({one(rest[0])}.astype({kind}) * {one(rest[1])}.astype({kind})).view(u64)"
        if carry is not None:
            sets = o.write_predicate(carry, "s < t")
            result = f"(t := {o.w(rest[2])}, s := {product} + t)[1]"
        else:
            sets, result = "None", f"{product} + {o.w(rest[2])}"
        if "HI" in how:
            return f"(x := {result}, {sets}, {o.write(to, 'x >> u64(32)')})"
        return f"(x := {result}, {sets}, {o.write_pair(to, 'x')})"
    if "MOV" in how:
        return o.write(to, o.u(rest[2]))
    if carry is None:
        if register(rest[1]) == RZ or register(rest[0]) == RZ:  # as it is often written to move and to add
            return o.write(to, o.u(rest[2]) + carried)
        return o.write(to, f"{o.u(rest[0])} * {o.u(rest[1])} + {o.u(rest[2])}{carried}")
    total = f"({o.u(rest[0])} * {o.u(rest[1])}).astype(u64) + {o.u(rest[2])}{carried}"
    return f"(s := {total}, {o.write_predicate(carry, 's >> u64(32)')}, {o.write(to, 's')})"


@means("IADD3", "UIADD3")
def add_three(o: Operands) -> str:
    how = o.allow("X", "64")
    to, carries = o.texts.pop(0), []
    while (carry := o.take_predicate()) is not None:
        carries.append(carry)
    terms, carried = o.texts[:3], o.texts[3:]
    if "64" in how:
        return o.write_pair(to, " + ".join(map(o.w, terms)))
    if not carries and not carried:
        return o.write(to, " + ".join(o.u(t) for t in terms if register(t) != RZ) or o.u("RZ"))
    # A borrow is the lack of a carry: -x counts as ~x and one more, but -0 as 0. With a carry in it is written ~x.
    parts, ones = [], 0
    for t in terms:
        if t.startswith("-") and number(t) is None:
            ones, t = (ones + 1, "~" + t[1:]) if register(t[1:]) != RZ else (ones, "RZ")
        if register(t) != RZ:
            parts.append(f"{o.u(t)}.astype(u64)")
    parts += [o.p(t) for t in carried if predicate(t.lstrip("!")) != PT or not t.startswith("!")]
    total = " + ".join([o.fixed(ones, np.uint64), *parts])
    sets = [o.write_predicate(carry, f"s >> u64(32) > {i}") for i, carry in enumerate(carries)]
    return f"(s := {total}, {', '.join([*sets, o.write(to, 's')])})"


@means("VIADD", "IADD", "UIADD")
def add_two(o: Operands) -> str:
    o.allow()
    return o.write(o.texts[0], f"{o.u(o.texts[1])} + {o.u(o.texts[2])}")


@means("LEA", "ULEA")
def scaled_add(o: Operands) -> str:
    how = o.allow("HI", "X", "SX32")
    to, carry = o.texts.pop(0), o.take_predicate()
    a, b = o.texts.pop(0), o.u(o.texts.pop(0))
    if "HI" in how:
        upper = o.u(o.texts.pop(0)) if "SX32" not in how else f"({o.i(a)} >> 31).view(u32)"
        shifted_a = f"(wide({o.u(a)}, {upper}) << u64({number(o.texts[0])}) >> u64(32))"
    else:
        shifted_a = f"({o.u(a)} << u32({number(o.texts[0])})).astype(u64)"
    carried = f" + {o.p(o.texts[1])}" if len(o.texts) > 1 else ""
    sets = o.write_predicate(carry, "s >> u64(32)")
    return f"(s := {shifted_a} + {b}{carried}, {sets}, {o.write(to, 's')})"


@means("LOP3", "ULOP3")
def bitwise(o: Operands) -> str:
    o.allow("LUT")
    sets, (to, a, b, c, table, *more) = o.take_predicate(), o.texts
    if more and predicate(more[0].lstrip("!")) not in (PT, PT + 8):
        raise o.unsupported("a predicate that it reads")
    value = logic(int(table, 16), o.u(a), o.u(b), o.u(c))
    return f"(s := {value}, {o.write_predicate(sets, 's != 0')}, {o.write(to, 's')})"


@means("PLOP3", "UPLOP3")
def of_predicates(o: Operands) -> str:
    o.allow("LUT")
    first, second, a, b, c, one, other = o.texts
    values = [logic(int(t, 16), o.p(a), o.p(b), o.p(c)) for t in (one, other)]
    sets = o.write_predicate(first, "s"), o.write_predicate(second, "t")
    return f"(s := {values[0]}, t := {values[1]}, {sets[0]}, {sets[1]})"


@means("SHF", "USHF")
def funnel_shift(o: Operands) -> str:
    how = o.allow("L", "R", "U32", "S32", "U64", "S64", "HI", "W")
    to, low, by, high = o.texts
    value = f"wide({o.u(low)}, {o.u(high)})"
    if "R" in how and how & {"S32", "S64"}:
        value += ".view(i64)"
    bits = 63 if how & {"U64", "S64"} else 32
    return o.write(to, f"shifted({value}, {o.u(by)}, {'L' in how}, {bits}, {'W' in how}, {'HI' in how})")


@means("SEL", "USEL")
def select(o: Operands) -> str:
    o.allow()
    to, a, b, choice = o.texts
    return o.write(to, f"where({o.p(choice)}, {o.u(a)}, {o.u(b)})")


@means("IABS")
def absolute(o: Operands) -> str:
    o.allow()
    return o.write(o.texts[0], f"abs({o.i(o.texts[1])})", "I")


@means("VIMNMX", "IMNMX", "UIMNMX", "VIADDMNMX")
def extreme_integer(o: Operands) -> str:
    how = o.allow("U32", "S32")
    one, letter = (o.u, "R") if "U32" in how else (o.i, "I")
    to, *terms, least = o.texts
    a, b = map(one, terms[-2:])
    if o.ins.base == "VIADDMNMX":
        a = f"({one(terms[0])} + {a})"
    return o.write(to, f"where({o.p(least)}, np.minimum({a}, {b}), np.maximum({a}, {b}))", letter)


@means("PRMT", "UPRMT")
def permute(o: Operands) -> str:
    o.allow()
    to, a, selector, b = o.texts
    if set(selector[2:].zfill(4)) <= set("01234567") and number(selector) == 0x5410:  # two halves: often
        return o.write(to, f"{o.u(a)} & u32(0xFFFF) | {o.u(b)} << u32(16)")
    return o.write(to, f"permuted({o.u(a)}, {o.u(selector)}, {o.u(b)})")


@means("POPC", "UPOPC")
def population(o: Operands) -> str:
    o.allow()
    return o.write(o.texts[0], f"count_bits({o.u(o.texts[1])})")


@means("FLO", "UFLO")
def first_bit(o: Operands) -> str:
    how = o.allow("U32", "SH")
    length = f"bit_length({o.u(o.texts[1])})"
    found = f"u32(32) - {length}" if "SH" in how else f"{length} - u32(1)"
    return o.write(o.texts[0], f"where({o.u(o.texts[1])} == 0, u32(0xFFFFFFFF), {found})")


@means("BREV", "UBREV")
def reverse(o: Operands) -> str:
    o.allow()
    return o.write(
        o.texts[0], f"sum(({o.u(o.texts[1])} >> u32(i) & u32(1)) << u32(31 - i) for i in range(32))"
    )


@means("P2R")
def predicates_to_register(o: Operands) -> str:
    o.allow()
    to, _, old, which = o.texts
    bits = " | ".join(f"P{i}.astype(u32) << u32({i})" for i in range(7) if number(which) >> i & 1)
    return o.write(to, f"{bits} | {o.u(old)} & u32({~number(which) & 0xFFFFFFFF})")


@means("R2P")
def register_to_predicates(o: Operands) -> str:
    o.allow()
    bits = [i for i in range(7) if number(o.texts[2]) >> i & 1]
    sets = [o.write_predicate(f"P{i}", f"s >> u32({i}) & u32(1)") for i in bits]
    return f"(s := {o.u(o.texts[1])}, {', '.join(sets)})"


# ---- comparisons -----------------------------------------------------------------------------------------------------

COMPARE = {"EQ": "==", "NE": "!=", "LT": "<", "LE": "<=", "GT": ">", "GE": ">="}
COMBINE = {"AND": "&", "OR": "|", "XOR": "^"}
FLOATING = [*COMPARE, *(f"{name}U" for name in COMPARE), "NAN", "NUM"]


def one_of(o: Operands, names) -> str:
    return next(name for name in o.ins.modifiers if name in names)


def combined(o: Operands, result: str, other: str) -> str:
    """A comparison and its opposite, each combined with a predicate."""
    by = COMBINE[one_of(o, COMBINE)]
    sets = o.write_predicate(o.texts[0], f"s {by} t"), o.write_predicate(o.texts[1], f"~s {by} t")
    return f"(s := {result}, t := {o.p(other)}.copy(), {sets[0]}, {sets[1]})"


@means("ISETP", "UISETP")
def compare_integers(o: Operands) -> str:
    how = o.allow(*COMPARE, *COMBINE, "U32", "EX")
    name, one = one_of(o, COMPARE), o.u if "U32" in how else o.i
    a, b = one(o.texts[2]), one(o.texts[3])
    result = f"({a} {COMPARE[name]} {b})"
    if "EX" in how:  # the upper halves: where they are equal, the lower halves have decided
        lower = o.p(o.texts[5])
        strict = COMPARE[{"LE": "LT", "GE": "GT", "EQ": "NE"}.get(name, name)]
        equal = f"({a} == {b}) & {lower}"
        result = equal if name == "EQ" else f"({a} {strict} {b}) | {equal}"
    return combined(o, f"({result})", o.texts[4])


def float_comparison(o: Operands, name: str, a: str, b: str) -> str:
    """With a U behind its name it is true as well where one is no number."""
    none = f"(isnan({a}) | isnan({b}))"
    if name in ("NAN", "NUM"):
        return none if name == "NAN" else f"~{none}"
    result = f"({a} {COMPARE[name[:2]]} {b})"
    if name == "NE":
        return f"({result} & ~{none})"
    return f"({result} | {none})" if name.endswith("U") and name != "NEU" else result


@means("FSETP", "DSETP")
def compare_floats(o: Operands) -> str:
    o.allow(*FLOATING, *COMBINE, "FTZ")
    one = o.f if o.ins.base == "FSETP" else o.d
    result = float_comparison(o, one_of(o, FLOATING), one(o.texts[2]), one(o.texts[3]))
    return combined(o, result, o.texts[4])


@means("FSET")
def compare_floats_to_register(o: Operands) -> str:
    how = o.allow(*FLOATING, *COMBINE, "FTZ", "BF")
    to, a, b, other = o.texts
    result = float_comparison(o, one_of(o, FLOATING), o.f(a), o.f(b))
    true = "u32(0x3F800000)" if "BF" in how else "u32(0xFFFFFFFF)"
    return o.write(to, f"where({result} {COMBINE[one_of(o, COMBINE)]} {o.p(other)}, {true}, u32(0))")


@means("FCHK")
def check_division(o: Operands) -> str:
    o.allow("DIVIDE")
    return o.write_predicate(o.texts[0], f"~divides_simply({o.f(o.texts[1])}, {o.f(o.texts[2])})")


# ---- floats ----------------------------------------------------------------------------------------------------------


@means("FADD", "FMUL", "FFMA")
def float_arithmetic(o: Operands) -> str:
    how = o.allow("FTZ", "SAT", "RM", "RP", "RZ", "RN")
    terms = [o.f(text) for text in o.texts[1:]]
    way = next((name for name in ("RM", "RP", "RZ") if name in how), None)
    if (
        o.ins.base == "FFMA" or way
    ):  # a product of two floats is exact as a double; their sum is rounded twice
        terms[0] += ".astype(f64)"
    value = f"{terms[0]} {'+' if o.ins.base == 'FADD' else '*'} {terms[1]}"
    value += f" + {terms[2]}" if o.ins.base == "FFMA" else ""
    value = f"rounded({value}, {way!r})" if way else value
    return o.write(o.texts[0], f"saturated({value})" if "SAT" in how else value, "F")


@means("FSEL")
def select_float(o: Operands) -> str:
    o.allow("FTZ")
    to, a, b, choice = o.texts
    return o.write(to, f"where({o.p(choice)}, {o.f(a)}, {o.f(b)})", "F")


@means("FMNMX")
def extreme_float(o: Operands) -> str:
    how = o.allow("FTZ", "NAN")
    to, a, b, least = o.texts
    low, high = ("minimum", "maximum") if "NAN" in how else ("fmin", "fmax")
    return o.write(
        to, f"where({o.p(least)}, np.{low}({o.f(a)}, {o.f(b)}), np.{high}({o.f(a)}, {o.f(b)}))", "F"
    )


SPECIAL = {"RCP": "f32(1) / {}", "RSQ": "f32(1) / np.sqrt({})", "SQRT": "np.sqrt({})", "EX2": "np.exp2({})",
           "LG2": "np.log2({})", "SIN": "np.sin({})", "COS": "np.cos({})", "TANH": "np.tanh({})"}  # fmt: skip


@means("MUFU")
def special_function(o: Operands) -> str:
    o.allow(*SPECIAL, "RCP64H", "RSQ64H", "FTZ")
    name = o.ins.modifiers[0]
    if name.endswith("64H"):  # of a double, from its upper half to its upper half
        x = f"wide(R{RZ}, {o.u(o.texts[1])}).view(f64)"
        value = f"1 / {x}" if name == "RCP64H" else f"1 / np.sqrt({x})"
        return o.write(o.texts[0], f"({value}).view(u64) >> u64(32)")
    return o.write(o.texts[0], SPECIAL[name].format(o.f(o.texts[1])), "F")


@means("DFMA", "DADD", "DMUL")
def double_arithmetic(o: Operands) -> str:
    how = o.allow("RM", "RP", "RZ")
    if how and o.ins.base != "DMUL":
        raise o.unsupported("the rounding")
    terms = [o.d(text) for text in o.texts[1:]]
    value = {"DFMA": "fused({}, {}, {})", "DADD": "({} + {})", "DMUL": "({} * {})"}[o.ins.base]
    return o.write_pair(o.texts[0], value.format(*terms))


# ---- from one kind of number to another --------------------------------------------------------------------------------


@means("I2F", "I2FP")
def integer_to_float(o: Operands) -> str:
    how = o.allow("U32", "S32", "U64", "S64", "F32", "F64", "RP", "RM", "RZ", "RN")
    to, of = o.texts
    if how & {"U64", "S64"}:
        value = o.w(of) + (".view(i64)" if "S64" in how else "")
    else:
        value = o.u(of) if "U32" in how else o.i(of)
    if "F64" in how:
        return o.write_pair(to, f"{value}.astype(f64)")
    way = next((name for name in ("RP", "RM", "RZ") if name in how), None)
    return o.write(to, f"rounded({value}.astype(np.longdouble), {way!r})" if way else value, "F")


STEPS = {"TRUNC": "np.trunc", "FLOOR": "np.floor", "CEIL": "np.ceil"}


@means("F2I")
def float_to_integer(o: Operands) -> str:
    how = o.allow("FTZ", "U32", "S32", "U64", "S64", *STEPS, "NTZ", "F64", "F32")
    step = next((STEPS[name] for name in STEPS if name in how), "np.rint")
    of = (o.d if "F64" in how else o.f)(o.texts[1])
    is_wide, signed = bool(how & {"U64", "S64"}), not how & {"U32", "U64"}
    value = f"to_integer({of}, {step}, {64 if is_wide else 32}, {signed})"
    return o.write_pair(o.texts[0], value) if is_wide else o.write(o.texts[0], value)


@means("FRND")
def round_to_whole(o: Operands) -> str:
    how = o.allow("FTZ", *STEPS, "F64")
    step = next((STEPS[name] for name in STEPS if name in how), "np.rint")
    if "F64" in how:
        return o.write_pair(o.texts[0], f"{step}({o.d(o.texts[1])})")
    return o.write(o.texts[0], f"{step}({o.f(o.texts[1])})", "F")


@means("F2F")
def float_to_float(o: Operands) -> str:
    o.allow("F16", "BF16", "F32", "F64", "FTZ")
    to, of = [name for name in o.ins.modifiers if name != "FTZ"]
    if of == "F64" and to == "F32":
        return o.write(o.texts[0], o.d(o.texts[1]), "F")
    if of != "F32":
        raise o.unsupported(f"{of} to {to}")
    value = o.f(o.texts[1])
    if to == "F64":
        return o.write_pair(o.texts[0], f"{value}.astype(f64)")
    return o.write(o.texts[0], f"{'bits_of_half' if to == 'F16' else 'bits_of_bfloat16'}({value})")


@means("F2FP")
def floats_to_halves(o: Operands) -> str:
    how = o.allow("F16", "BF16", "F32", "PACK_AB")
    bits = "bits_of_bfloat16" if "BF16" in how else "bits_of_half"
    to, upper, lower = o.texts
    return o.write(to, f"{bits}({o.f(lower)}) | {bits}({o.f(upper)}) << u32(16)")


@means("HADD2")
def half_to_float(o: Operands) -> str:
    if o.allow("F32") != {"F32"} or register(o.texts[1].lstrip("-")) != RZ:
        raise o.unsupported("arithmetic of halves")
    return o.write(o.texts[0], o.half(o.texts[2]), "F")


@means("HFMA2")
def half_constant(o: Operands) -> str:
    """Only as the compiler writes a constant: two halves added to nothing."""
    o.allow("MMA")
    to, a, b, *halves = o.texts
    if register(a.lstrip("-")) != RZ or register(b) != RZ:
        raise o.unsupported("arithmetic of halves")
    upper, lower = (int(np.float16(number(text)).view(np.uint16)) for text in halves)
    return o.write(to, o.fixed(upper << 16 | lower, np.uint32))
