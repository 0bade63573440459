"""Problems thought through in Chinese: equations, remainders, cases, sequences, programs, prose."""

import json
import math
import random
from collections.abc import Callable, Mapping
from fractions import Fraction
from itertools import combinations

from convert.calibration import Conversation
from convert.texts.thought import Thought
from convert.texts.worked import Dice, Maker, Problem, Sheet, Worked, boxed, user, worksheet

_REQUESTS = (
    "请一步一步推理,并把最终答案放在 \\boxed{} 中。",
    "请逐步思考,最后的答案写在 \\boxed{} 里。",
    "请把最终结果用 \\boxed{} 框出来。",
)
_CHOICE = '请在 `answer` 字段中只填写选项字母,例如 "answer": "C"。'
_BANKS: Mapping[str, tuple[str, ...]] = {
    "open": (
        "好的,我先把题目读一遍。",
        "嗯,让我想想这道题。",
        "首先,我需要弄清楚题目在问什么。",
        "好,我们一步一步来。",
        "先把已知条件整理一下。",
        "这道题看起来不难,但要小心。",
        "让我先理清思路。",
    ),
    "doubt": (
        "等等,我再确认一下。",
        "不对吗?让我再看看。",
        "等一下,这里需要仔细一点。",
        "这一步对吗?我再想想。",
        "嗯,会不会漏掉了什么情况?",
        "先别急,回头检查一下。",
        "我有没有看错题目?",
    ),
    "check": (
        "现在来验证一下。",
        "把结果代回去检验。",
        "为了保险起见,再检查一遍。",
        "我们来验算。",
        "看看是否满足所有条件。",
        "反过来检查一下。",
    ),
    "fine": ("没问题。", "对的。", "符合条件。", "这样就对上了。", "很好。", "成立。", "一致。"),
    "second": (
        "再换一种方法算一算。",
        "有没有别的思路可以印证?",
        "为了确认,我用另一种方法再做一次。",
        "不妨从另一个角度来看。",
        "另外还可以这样想。",
    ),
    "agree": (
        "两种方法结果相同,可以放心了。",
        "结果一样,说明没有算错。",
        "和前面得到的一致。",
        "殊途同归,答案可靠。",
    ),
    "close": (
        "所以答案就确定了。",
        "好,可以写答案了。",
        "这样问题就解决了。",
        "我对这个结果比较有把握。",
        "下面把过程整理出来。",
    ),
    "stuck": ("这样太麻烦了,换个办法。", "这条路走不通。", "好像绕远了。", "不行,得退回去重新想。"),
}
_NAMES = "小明 小红 小刚 小丽 阿强 阿梅 老王 小李 小周 小陈 晓雯 志远".split()


def _thought(rng: random.Random) -> Thought:
    return Thought(rng, _BANKS, join="")


def cages(rng: random.Random, size: int) -> Worked:
    """Two kinds with totals of heads and legs, by equations and by a supposition."""
    big, small, a, b, unit, part = rng.choice(
        (
            ("兔", "鸡", 4, 2, "只", "只脚"),
            ("三轮车", "自行车", 3, 2, "辆", "个轮子"),
            ("汽车", "摩托车", 4, 2, "辆", "个轮子"),
            ("大船", "小船", 6, 4, "条", "个座位"),
            ("大盒铅笔", "小盒铅笔", 12, 5, "盒", "支铅笔"),
            ("方桌", "三脚凳", 4, 3, "件", "条腿"),
        )
    )
    x, y = rng.randint(4, 20 * size), rng.randint(4, 20 * size)
    n, total = x + y, a * x + b * y
    question = rng.choice(
        (
            (
                f"{big}和{small}一共有 {n} {unit},总共有 {total} {part}。已知每{unit}{big}有 {a} {part},"
                f"每{unit}{small}有 {b} {part}。{big}有多少{unit}?"
            ),
            (
                f"现有{big}、{small}共 {n} {unit},合计 {total} {part}({big}每{unit} {a},{small}每{unit} "
                f"{b})。求{big}的数量。"
            ),
        )
    )
    t = _thought(rng).turn("open")
    t.say(f"设{big}有 x {unit},{small}有 y {unit}。那么 x + y = {n},{a}x + {b}y = {total}。")
    t.gap().say(f"由第一个式子,y = {n} - x。代入第二个:{a}x + {b}({n} - x) = {total}。")
    t.say(
        f"展开得 {a}x + {b * n} - {b}x = {total},也就是 {a - b}x = {total} - {b * n} = "
        f"{total - b * n}。所以 x = {total - b * n} / {a - b} = {x}。"
    )
    t.say(f"于是 y = {n} - {x} = {y}。")
    t.gap().turn("check").say(
        f"{a} * {x} + {b} * {y} = {a * x + b * y},正好是 {total};{x} + {y} = {n}。"
    ).turn("fine")
    t.gap().turn("second").say(
        f"假设全部都是{small},那么应该有 {b} * {n} = {b * n},比实际少 {total} - {b * n} = "
        f"{total - b * n}。每把一{unit}{small}换成{big},就多 {a} - {b} = {a - b},所以要换 "
        f"{total - b * n} / {a - b} = {x} 次。"
    ).turn("agree")
    if size > 1:
        t.gap().turn("doubt").say("题目问的是哪一种?").say(
            f"问的是{big},不是{small},所以应该回答 {x},而不是 {y}。"
        )
    if size > 2:
        t.gap().say("也可以列表逐步逼近:").gap()
        guess = n // 2
        while guess != x:
            value = a * guess + b * (n - guess)
            less = value < total
            t.line(
                f"若{big}有 {guess} {unit}:{a} * {guess} + {b} * {n - guess} = {value},"
                + ("偏少,应再多一些。" if less else "偏多,应再少一些。")
            )
            guess += max(1, abs(total - value) // (a - b) // 2) * (1 if less else -1)
        t.line(f"若{big}有 {x} {unit}:{a} * {x} + {b} * {y} = {total},正好。")
    t.gap().turn("close")
    explanation = (
        f"设{big} $x$ {unit}、{small} $y$ {unit},则 $x+y={n}$,${a}x+{b}y={total}$。"
        f"消去 $y$ 得 ${a - b}x={total - b * n}$,所以 $x={x}$,$y={y}$。"
    )
    return Worked(question, t, explanation, str(x), (str(y), str(abs(x - y))))


def remainders(rng: random.Random, size: int) -> Worked:
    """The smallest number with given remainders."""
    count = 2 if size < 3 else 3
    while True:
        moduli = sorted(rng.sample((3, 4, 5, 7, 9, 11, 13, 16), count))
        whole = math.prod(moduli)
        if math.lcm(*moduli) == whole and whole > 40:
            break
    wanted = [rng.randrange(1, m) for m in moduli]
    result = next(n for n in range(1, whole + 1) if [n % m for m in moduli] == wanted)
    thing = rng.choice(("糖果", "士兵", "图书", "棋子", "苗木", "邮票"))
    said = ",".join(f"每 {m} 个一组余 {r} 个" for r, m in zip(wanted, moduli, strict=True))
    question = rng.choice(
        (f"有一堆{thing},{said}。这堆{thing}最少有多少个?", f"一些{thing}{said},求最小的个数。")
    )
    t = (
        _thought(rng)
        .turn("open")
        .say(
            "换成同余式:"
            + ",".join(f"n ≡ {r} (mod {m})" for r, m in zip(wanted, moduli, strict=True))
            + "。"
        )
    )
    t.say(f"这些除数两两互质,所以在 1 到 {whole} 之间只有一个解。")
    value, step = wanted[-1], moduli[-1]
    t.gap().say(f"从最大的除数 {step} 开始:n 可以是 {value}、{value + step}、{value + 2 * step}……")
    for r, m in reversed(list(zip(wanted[:-1], moduli[:-1], strict=True))):
        t.gap().say(f"再看除以 {m} 余 {r} 这个条件。")
        while value % m != r:
            t.line(
                f"{value} = {m} * {value // m} + {value % m},余 {value % m},不行。",
                f"{value} 除以 {m} 余 {value % m},不是 {r}。",
                f"试 {value}:余数是 {value % m},继续。",
            )
            value += step
        t.line(f"{value} = {m} * {value // m} + {r},余 {r},可以。")
        step *= m
        t.gap().say(f"所以 n = {value} + {step}k。")
        t.turn("doubt", chance=0.4)
    t.gap().turn("check")
    for r, m in zip(wanted, moduli, strict=True):
        t.say(f"{value} = {m} * {value // m} + {r}。")
    t.turn("fine")
    if size > 1:
        t.gap().turn("second").say("按照孙子定理来构造。").gap()
        terms = []
        for r, m in zip(wanted, moduli, strict=True):
            rest = whole // m
            inverse = pow(rest, -1, m)
            terms.append(r * rest * inverse)
            t.line(
                f"除数 {m}:其余之积是 {rest},{rest} * {inverse} = {rest * inverse},除以 {m} 余 1。"
                f"乘以余数:{r} * {rest * inverse} = {terms[-1]}。"
            )
        t.gap().say(
            f"相加:{' + '.join(map(str, terms))} = {sum(terms)}。减去 {whole} 的倍数:{sum(terms)} - "
            f"{sum(terms) // whole} * {whole} = {result}。"
        ).turn("agree")
    t.gap().turn("close")
    explanation = f"逐个检验满足条件的数,得到 $n={result}$,并且在模 ${whole}$ 的意义下唯一。"
    return Worked(question, t, explanation, str(result))


def sums(rng: random.Random, size: int) -> Worked:
    """How many numbers of some digits have a digit sum, by cases of the first digit."""
    total, most = rng.randint(5, 14 + 2 * size), rng.randint(4, 9)
    question = rng.choice(
        (
            f"各位数字之和等于 {total}、百位数字不超过 {most} 的三位数有多少个?",
            f"有多少个三位数,三个数字加起来是 {total},而百位不大于 {most}?",
        )
    )
    counts = []
    t = (
        _thought(rng)
        .turn("open")
        .say(f"按百位数字分类。百位是 1 到 {most},十位和个位是 0 到 9。")
        .gap()
    )
    for first in range(1, most + 1):
        rest = total - first
        low, high = max(0, rest - 9), min(9, rest)
        n = max(0, high - low + 1)
        counts.append(n)
        if n == 0:
            t.line(f"百位是 {first}:剩下 {total} - {first} = {rest},两个数字凑不出来,0 个。")
        else:
            t.line(
                f"百位是 {first}:剩下 {total} - {first} = {rest},十位从 {low} 到 {high},共 "
                f"{high} - {low} + 1 = {n} 个。"
            )
            if size > 2:
                shown = "、".join(f"{first}{d}{rest - d}" for d in range(low, high + 1))
                t.say(f"它们是 {shown}。")
        t.turn("doubt", "fine", chance=0.1)
    result = sum(counts)
    t.gap().say(f"合计:{' + '.join(map(str, counts))} = {result}。").turn("doubt")
    t.say("十位和个位可以是 0,这一点已经考虑到了。")
    if size > 1:
        t.gap().turn("second").say(
            "设百位为 a,令 a' = a - 1,则 a' + b + c = "
            f"{total} - 1 = {total - 1},其中 a' 在 0 到 {most - 1},b、c 在 0 到 9。用隔板法再排除超出的情形。"
        )
        free = math.comb(total + 1, 2)
        t.say(f"不限上界时有 C({total + 1}, 2) = {free} 种。")

        def over(limit: int) -> int:
            return math.comb(max(0, total - 1 - limit + 2), 2)

        one, ten = over(most), over(10)
        both = 2 * over(most + 10) + over(20)
        t.say(
            f"a' ≥ {most} 的有 {one} 种,b ≥ 10 和 c ≥ 10 的各有 {ten} 种;两个同时超出的共 {both} 种。"
            f"于是 {free} - {one} - {ten} - {ten} + {both} = {free - one - 2 * ten + both}。"
        ).turn("agree")
    t.gap().turn("close")
    explanation = f"按百位数字 $1$ 到 ${most}$ 分类,依次有 ${', '.join(map(str, counts))}$ 个,共 ${result}$ 个。"
    return Worked(question, t, explanation, str(result), (str(result + counts[0]),))


_RULES: Mapping[str, Callable[[int, int], int]] = {
    "和": lambda x, y: x + y,
    "积": lambda x, y: x * y,
    "加权": lambda x, y: x + 2 * y,
}


def sequence(rng: random.Random, size: int) -> Worked:
    """A far term of a recurrence of last digits."""
    while True:
        a, b = rng.randint(1, 9), rng.randint(1, 9)
        kind = rng.choice(("和", "积", "加权"))
        modulus = 10 if kind != "加权" else rng.randint(5, 7 + 2 * size)
        terms = [a % modulus, b % modulus]
        rule = _RULES[kind]
        seen: dict[tuple[int, int], int] = {}
        while (terms[-2], terms[-1]) not in seen:
            seen[terms[-2], terms[-1]] = len(terms) - 2
            terms.append(rule(terms[-2], terms[-1]) % modulus)
        start = seen[terms[-2], terms[-1]]
        period = len(terms) - 2 - start
        if 3 <= len(terms) <= 12 + 18 * size and terms[0] and terms[1]:
            break
    wanted = rng.randint(100, 3000)
    place = (wanted - 1 - start) % period + start
    described = {"和": "前两项之和", "积": "前两项之积", "加权": "前一项的 2 倍与再前一项之和"}[
        kind
    ]
    question = (
        f"数列的前两项是 {terms[0]} 和 {terms[1]},从第三项起,每一项都是{described}除以 {modulus} 的"
        f"余数。第 {wanted} 项是多少?"
    )
    t = _thought(rng).turn("open").say("直接算那么多项不现实,应该找周期。先一项一项算。").gap()
    for n in range(2, len(terms)):
        x, y = terms[n - 2], terms[n - 1]
        work = {"和": f"{x} + {y}", "积": f"{x} * {y}", "加权": f"{x} + 2 * {y}"}[kind]
        t.line(f"第 {n + 1} 项:{work} = {rule(x, y)},余 {terms[n]}。")
        if n % 10 == 0:
            t.turn("doubt", chance=0.5)
            t.say("到这里还没有出现重复的相邻两项。")
    t.gap().say(
        f"现在出现了 {terms[-2]}、{terms[-1]},和第 {start + 1}、第 {start + 2} 项相同。所以从第 "
        f"{start + 1} 项开始循环,周期是 {period}。"
    )
    shift = wanted - 1 - start
    t.gap().say(
        f"第 {wanted} 项:{wanted} - 1 - {start} = {shift},{shift} 除以 {period} 余 {shift % period}。"
        f"所以它等于第 {place + 1} 项,也就是 {terms[place]}。"
    )
    t.turn("doubt").say("编号从 1 开始,所以减 1 是必要的。").turn("fine")
    t.gap().turn("close")
    explanation = f"数列从第 ${start + 1}$ 项起以 ${period}$ 为周期,第 ${wanted}$ 项等于第 ${place + 1}$ 项,即 ${terms[place]}$。"
    return Worked(question, t, explanation, str(terms[place]))


def liars(rng: random.Random, size: int) -> Worked:
    """Who did it, where exactly some number of the statements is true."""
    n = min(3 + size // 2, 5)
    while True:
        people = rng.sample(_NAMES, n)
        claims = []
        for name in people:
            other = rng.choice([p for p in people if p != name])
            claims.append(rng.choice((("是", other), ("不是", other), ("不是", name))))
        true_of = {
            culprit: [(who == culprit) == (said == "是") for said, who in claims]
            for culprit in people
        }
        counts = {culprit: sum(values) for culprit, values in true_of.items()}
        unique = [c for c in people if list(counts.values()).count(counts[c]) == 1]
        if unique:
            culprit = rng.choice(unique)
            break
    true = counts[culprit]
    speech = "\n".join(
        f"- {name}说:“{'我' if who == name else who}{said}打碎花瓶的人。”"
        for name, (said, who) in zip(people, claims, strict=True)
    )
    question = (
        f"{'、'.join(people)}当中有一个人打碎了花瓶。他们说:\n{speech}\n已知其中恰好有 {true} 句话是真的。"
        "是谁打碎了花瓶?"
    )
    t = _thought(rng).turn("open").say(f"一共 {n} 种可能,逐一假设,数一数真话有几句。")
    for suspect in people:
        t.gap().say(f"假设是{suspect}。")
        for name, (said, who), holds in zip(people, claims, true_of[suspect], strict=True):
            t.say(
                f"{name}说{'自己' if who == name else who}{said},"
                + ("这是真话。" if holds else "这是假话。")
            )
        k = counts[suspect]
        t.say(f"真话有 {k} 句," + ("正好符合。" if k == true else f"而不是 {true} 句,矛盾。"))
        t.turn("doubt", chance=0.2)
    t.gap().turn("check").say(f"只有{culprit}这种情况符合,所以答案是{culprit}。").turn("close")
    explanation = f"逐一假设后,只有{culprit}打碎花瓶时真话恰好是 ${true}$ 句。"
    near = tuple(name for name in people if name != culprit)
    return Worked(question, t, explanation, culprit, near)


def work(rng: random.Random, size: int) -> Worked:
    """Two or three at work together, one of whom leaves."""
    n = 2 if size < 3 else 3
    while True:
        days = sorted(rng.sample((6, 8, 9, 10, 12, 15, 18, 20, 24, 30), n))
        together = rng.randint(1, 3)
        rates = [Fraction(1, d) for d in days]
        done = together * sum(rates, Fraction(0))
        if done < 1:
            break
    names = "甲乙丙"[:n]
    rest = 1 - done
    stay = sum(rates[1:], Fraction(0))
    more = rest / stay
    result = together + more
    said = ",".join(f"{name}单独做要 {d} 天" for name, d in zip(names, days, strict=True))
    question = (
        f"一项工程,{said}。{'、'.join(names)}一起做了 {together} 天后,甲离开,其余的人继续做完。"
        "从开始到完工一共用了多少天?"
    )
    t = _thought(rng).turn("open").say("设总工程量为 1。")
    for name, d in zip(names, days, strict=True):
        t.say(f"{name}每天做 1/{d}。")
    common = math.lcm(*days)
    parts = [common // d for d in days]
    t.gap().say(
        f"通分,公分母是 {common}:{' + '.join(map(str, parts))} = {sum(parts)},所以合作每天做 "
        f"{sum(rates, Fraction(0))}。{together} 天做了 {done},剩下 {rest}。"
    )
    t.gap().say(f"甲离开后,每天做 {stay}。还需要 ({rest}) / ({stay}) = {more} 天。")
    t.turn("doubt").say("题目问的是从开始算起的总天数,所以要把前面的天数加上。")
    t.say(f"{together} + {more} = {result}。")
    t.gap().turn("check").say(
        f"甲做了 {together} 天,完成 {rates[0] * together};其余的人做了 {result} 天,完成 "
        f"{stay * result};两部分相加是 {rates[0] * together + stay * result}。"
    ).turn("fine")
    t.gap().turn("close")
    explanation = (
        f"前 ${together}$ 天完成 ${done}$,余下的 ${rest}$ 以每天 ${stay}$ 的速度还需 ${more}$ 天。"
    )
    return Worked(question, t, explanation, str(result), (str(more),))


def draws(rng: random.Random, size: int) -> Worked:
    """The chance that two cards add up to something, all pairs listed."""
    n = rng.randint(5, 5 + 2 * size)
    kind = rng.choice(("偶数", "奇数", "3 的倍数", "质数"))
    tests: dict[str, Callable[[int], bool]] = {
        "偶数": lambda s: s % 2 == 0,
        "奇数": lambda s: s % 2 == 1,
        "3 的倍数": lambda s: s % 3 == 0,
        "质数": lambda s: s > 1 and all(s % p for p in range(2, s)),
    }
    pairs = list(combinations(range(1, n + 1), 2))
    good = [pair for pair in pairs if tests[kind](sum(pair))]
    chance = Fraction(len(good), len(pairs))
    question = f"从写有 1 到 {n} 的 {n} 张卡片中任取两张,两数之和是{kind}的概率是多少?"
    t = (
        _thought(rng)
        .turn("open")
        .say(f"一共有 C({n}, 2) = {len(pairs)} 种取法。按较小的数分类,列出和是{kind}的情形。")
        .gap()
    )
    running = 0
    for first in range(1, n):
        of_first = [pair for pair in good if pair[0] == first]
        shown = "、".join(f"{a} + {b} = {a + b}" for a, b in of_first)
        t.line(
            f"较小的是 {first}:{shown},共 {len(of_first)} 种。"
            if of_first
            else f"较小的是 {first}:没有符合的。"
        )
        t.say(f"累计 {running} + {len(of_first)} = {running + len(of_first)}。")
        running += len(of_first)
    t.gap().say(
        f"所以概率是 {len(good)}/{len(pairs)}"
        + (f",约分得 {chance}。" if str(chance) != f"{len(good)}/{len(pairs)}" else "。")
    )
    bad = len(pairs) - len(good)
    t.gap().turn("check").say(f"不符合的有 {bad} 种,{len(good)} + {bad} = {len(pairs)}。").turn(
        "fine"
    )
    t.turn("close")
    explanation = (
        f"共 $\\binom{{{n}}}{{2}}={len(pairs)}$ 种取法,其中 ${len(good)}$ 种的和是{kind}。"
    )
    return Worked(question, t, explanation, str(chance))


def table(rng: random.Random, size: int) -> Worked:
    """Totals of a small table, checked by columns."""
    what, unit = rng.choice(
        (("各分店的销量", "件"), ("各班的借书量", "本"), ("各村的苹果产量", "吨"))
    )
    rows = rng.sample(("东", "南", "西", "北", "中"), min(2 + size, 5))
    columns = ("一月", "二月", "三月", "四月")[: 2 + min(size, 2)]
    numbers = [[rng.randint(20, 300) for _ in columns] for _ in rows]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {r} | {' | '.join(map(str, v))} |" for r, v in zip(rows, numbers, strict=True)]
    sums = [sum(values) for values in numbers]
    result = max(sums) - min(sums)
    question = (
        f"下表是{what}(单位:{unit}):\n\n" + "\n".join(lines) + "\n\n合计最多的比合计最少的多多少?"
    )
    t = _thought(rng).turn("open").say("先求每一行的合计。").gap()
    for row, values in zip(rows, numbers, strict=True):
        t.line(f"{row}:{' + '.join(map(str, values))} = {sum(values)}。")
    t.gap().say(f"最大是 {max(sums)},最小是 {min(sums)},{max(sums)} - {min(sums)} = {result}。")
    t.gap().turn("check").say("按列再加一遍,总数应当相同。").gap()
    down = [sum(values[k] for values in numbers) for k in range(len(columns))]
    for k, column in enumerate(columns):
        t.line(f"{column}:{' + '.join(str(values[k]) for values in numbers)} = {down[k]}。")
    t.gap().say(
        f"行的总数:{' + '.join(map(str, sums))} = {sum(sums)};列的总数:{' + '.join(map(str, down))} = "
        f"{sum(down)}。"
    ).turn("agree").turn("close")
    explanation = f"各行合计依次为 ${', '.join(map(str, sums))}$,相差 ${result}$。"
    return Worked(question, t, explanation, str(result))


PROBLEMS: tuple[Problem, ...] = (cages, remainders, sums, sequence, liars, work, draws, table)
_NUMERIC: tuple[Problem, ...] = (cages, remainders, sums, sequence, table)


def choice(rng: Dice, size: int) -> Conversation:
    """One of the problems with four numbers to choose from."""
    worked = rng.choice(_NUMERIC)(rng, size)
    value = int(worked.result)
    others = dict.fromkeys((*worked.near, str(value + 1), str(value + 2), str(value + 10)))
    options = [worked.result, *[one for one in others if one != worked.result][:3]]
    rng.shuffle(options)
    letter = "ABCD"[options.index(worked.result)]
    listing = "\n".join(f"{a}. {b}" for a, b in zip("ABCD", options, strict=True))
    worked.thought.gap().say(
        f"对照选项,{worked.result} 是 {letter}。",
        f"四个选项里 {worked.result} 对应 {letter}。",
    )
    answer = f"{worked.explanation}\n\n{json.dumps({'answer': letter})}"
    request = f"{worked.question}\n{listing}\n{_CHOICE}"
    return Conversation("chinese", (user(request),), worked.thought.text, answer)


def _halving(rng: random.Random, size: int) -> tuple[str, list[str], str]:
    n = rng.randint(5, 20 + 30 * size)
    source = (
        f"n = {n}\nsteps = 0\nwhile n != 1:\n    if n % 2 == 0:\n        n = n // 2\n    else:\n"
        "        n = 3 * n + 1\n    steps += 1\nprint(steps)"
    )
    steps, lines = 0, []
    while n != 1:
        old = n
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        steps += 1
        how = f"偶数,{old} / 2 = {n}" if old % 2 == 0 else f"奇数,3 * {old} + 1 = {n}"
        lines.append(f"第 {steps} 次:{old} 是{how}。")
    return source, lines, str(steps)


def _digits(rng: random.Random, size: int) -> tuple[str, list[str], str]:
    n = rng.randint(10 ** (2 + size), 10 ** (4 + size))
    source = (
        f"n = {n}\ntotal = 0\nwhile n > 0:\n    total = total * 2 + n % 10\n    n //= 10\n"
        "print(total)"
    )
    total, lines = 0, []
    while n > 0:
        last, old = n % 10, total
        total = total * 2 + last
        n //= 10
        lines.append(f"个位是 {last},total = {old} * 2 + {last} = {total},剩下 n = {n}。")
    return source, lines, str(total)


def _filtered(rng: random.Random, size: int) -> tuple[str, list[str], str]:
    values = [rng.randint(1, 60) for _ in range(4 + 3 * size)]
    d = rng.randint(2, 5)
    source = (
        f"kept = []\nfor x in {values}:\n    if x % {d} == 0:\n        continue\n"
        "    if kept and x < kept[-1]:\n        kept.pop()\n    kept.append(x)\nprint(kept)"
    )
    kept: list[int] = []
    lines = []
    for x in values:
        if x % d == 0:
            lines.append(f"x = {x}:能被 {d} 整除,跳过,kept 还是 {kept}。")
            continue
        said = ""
        if kept and x < kept[-1]:
            said = f"比末尾的 {kept.pop()} 小,先弹出;"
        kept.append(x)
        lines.append(f"x = {x}:{said}加入后 kept = {kept}。")
    return source, lines, str(kept)


def program(rng: Dice, size: int) -> Conversation:
    """A program followed step by step."""
    source, lines, output = rng.choice((_halving, _digits, _filtered))(rng, size)
    question = rng.choice(("下面的 Python 程序会输出什么?", "不运行程序,说出它的输出。"))
    t = _thought(rng).turn("open").say("我像解释器那样一步一步执行,并记录每个变量。").gap()
    for number, line in enumerate(lines, start=1):
        t.line(line)
        if number % 8 == 0:
            t.gap().turn("doubt", "check").say("前面的状态都对得上。", "变量的值没有弄混。").gap()
    t.gap().say(f"循环结束,最后输出 {output}。").turn("close")
    answer = f"按顺序执行,程序输出:\n\n```\n{output}\n```"
    return Conversation(
        "chinese", (user(f"{question}\n\n```python\n{source}\n```"),), t.text, answer
    )


_THINGS: dict[str, tuple[str, ...]] = {
    "雨后的小巷": (
        "青石板上还积着水,映出半截灰墙。",
        "谁家的窗子开了一条缝,飘出炒蒜苗的味道。",
        "一只猫沿着墙根走,每一步都绕开水洼。",
        "屋檐的水滴得很慢,像是在数数。",
        "修伞的老人把摊子又摆了出来。",
        "孩子们折了纸船,争着看谁的先到巷口。",
    ),
    "清晨的菜市场": (
        "天还没亮透,三轮车的铃声已经响成一片。",
        "卖豆腐的掀开纱布,热气立刻白了半张脸。",
        "鱼在盆里翻身,水溅到过路人的鞋上。",
        "讨价还价的声音此起彼伏,谁也不真的生气。",
        "一位老太太挑辣椒,一个一个举到灯下看。",
        "收音机里报着天气,没有人在听。",
    ),
    "深夜的图书馆": (
        "台灯一盏一盏地灭,只剩角落里的两盏。",
        "翻书的声音比钟摆还要轻。",
        "窗外有人走过,影子在书架上慢慢移动。",
        "管理员把还回来的书按编号放好,像在给它们盖被子。",
        "桌上留着半杯凉透的茶。",
        "有人趴在地图册上睡着了,手指停在一条河上。",
    ),
    "山里的茶园": (
        "雾从沟底升上来,一层一层盖住茶树。",
        "采茶的人背着竹篓,手指在叶尖上飞快地点。",
        "新叶带着一点绒毛,捏在手里发凉。",
        "远处有人唱歌,隔着雾听不清词。",
        "炒锅边的师傅用手背试温度,从不看表。",
        "午后出了太阳,整面山坡都有了香味。",
    ),
}
_ADVICE: dict[str, tuple[str, ...]] = {
    "怎样养成早睡的习惯": (
        "先固定起床的时间,入睡的时间会慢慢跟上来。",
        "睡前一小时把手机放到另一个房间充电。",
        "下午以后少喝咖啡和浓茶。",
        "白天多晒太阳,晚上把灯光调暗。",
        "躺下二十分钟还睡不着,就起来看几页书,不要硬撑。",
        "偶尔晚睡不必自责,第二天照常起床就好。",
    ),
    "怎样准备一次短途骑行": (
        "出发前检查刹车、胎压和链条。",
        "路线宁可短一些,留出休息和迷路的时间。",
        "带一条备用内胎和一套小工具,并且在家里先练习一次。",
        "水要小口常喝,不要等到口渴。",
        "看好天气预报,尤其是风向,最好去时逆风、回时顺风。",
        "告诉家人路线和大概回来的时间。",
    ),
    "怎样读完一本很厚的书": (
        "先看目录和结尾,知道作者要往哪里去。",
        "每天定量,哪怕只有十页。",
        "读不懂的地方做个记号,先往下走。",
        "每读完一章,用两三句话写下它说了什么。",
        "找一个同样在读的人,每周聊一次。",
        "允许自己跳过,书不会生气。",
    ),
    "怎样在阳台上种番茄": (
        "选矮生的品种,花盆至少要装十升土。",
        "每天要有六小时以上的直射阳光。",
        "浇水浇在根部,早上浇,叶子不要弄湿。",
        "主茎旁边的侧芽要及时掐掉。",
        "开花以后轻轻摇一摇枝条,帮助授粉。",
        "果实转红再摘,味道完全不同。",
    ),
}


def prose(rng: Dice, size: int) -> Conversation:
    """A scene or some advice, chosen from what comes to mind."""
    scene = rng.random() < 0.5
    subject = rng.own(sorted(_THINGS if scene else _ADVICE))
    ideas = (_THINGS if scene else _ADVICE)[subject]
    n = min(2 + size, 5)
    chosen = [ideas[k] for k in sorted(rng.sample(range(6), n))]
    tone = rng.choice(("平实", "轻松", "克制", "温和"))
    question = (
        rng.choice(
            (
                f"用{tone}的语气写一段话,描写{subject},{n} 句左右。",
                f"写一小段文字:{subject}。语气要{tone},大约 {n} 句。",
            )
        )
        if scene
        else rng.choice(
            (
                f"{subject}?请给我 {n} 条建议,语气{tone}一些。",
                f"我想知道{subject},请列出 {n} 点,写得{tone}些。",
            )
        )
    )
    t = (
        _thought(rng)
        .turn("open")
        .say("先想一想有哪些可以写的。", "把想到的都列出来,再挑。", "要具体,不要空话。")
        .gap()
    )
    for idea in ideas:
        t.line(f"“{idea}”")
        if idea in chosen:
            t.say("这句留下。", "具体,可以用。", "好,这一句必要。", "用上。")
        else:
            t.say("可有可无,先不用。", "放不下了。", "和别的有点重复。", "这次不写。")
    t.gap().say(
        f"留下 {n} 句。语气要{tone},不用感叹号。", f"正好 {n} 句,顺序也合适,读起来是{tone}的。"
    )
    t.turn("check").turn("close")
    answer = (
        "".join(chosen) if scene else "\n".join(f"{k}. {one}" for k, one in enumerate(chosen, 1))
    )
    return Conversation("chinese", (user(question),), t.text, answer)


_SHEET = Sheet(
    (
        "请解答下面 {n} 道小题,把所有答案按顺序写在一个 \\boxed{} 里,用逗号隔开。",
        "以下共 {n} 题,逐题推理,最后把结果依次放在 \\boxed{} 中,用逗号分开。",
    ),
    ("一共 {n} 道题,互不相关,一道一道来。", "先从第一题开始,把每题的结果记下来,最后汇总。"),
    ("第 ({k}) 题。", "再看 ({k})。", "现在做 ({k})。", "({k}):"),
    ("({k}) 的结果是 {x},先记下。", "所以 ({k}) 得 {x}。", "这样 ({k}) 就是 {x},接着做下一步。"),
    (
        "写答案之前,再回头看一眼 ({k})。{why}没有问题,仍是 {x}。",
        "({k}) 步骤最多,再核对一次。{why}还是 {x}。",
    ),
    ("汇总起来:{all}。", "全部结果依次是 {all}。"),
)

MAKERS: tuple[Maker, ...] = (
    *(boxed("chinese", problem, _REQUESTS) for problem in PROBLEMS),
    choice,
    program,
    prose,
    worksheet("chinese", PROBLEMS, _SHEET),
)
