"""docs/play.html: its formulas are those of bank.py and loss.py, its buttons do what it says."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bank import MemoryBank
from loss import nce, sqrt_kl

PAGE = (Path(__file__).parent.parent / "docs" / "play.html").read_text(encoding="utf-8")
MATHS, SCRIPT = re.findall(r"<script[^>]*>\n(.*?)</script>", PAGE, re.S)
IDS = set(re.findall(r'\bid="([\w-]+)"', PAGE.partition("<script")[0]))
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")

# As much of a browser as the page asks for. An id that the page lacks is an error.
BROWSER = r"""
const page = {}
class Element {
  attributes = {}
  constructor(hidden) { this.hidden = hidden }
  set innerHTML(html) {
    this.html = html
    for (const [, id] of html.matchAll(/\bid="([\w-]+)"/g)) page[id] = new Element()
  }
  setAttribute(name, value) { this.attributes[name] = String(value) }
  getAttribute(name) { return this.attributes[name] }
  querySelector() { return new Element() }
  scrollIntoView() {}
}
for (const id of IDS) page[id] = new Element(id === "found")
const document = { getElementById(id) { if (page[id]) return page[id]; throw Error("no element has the id " + id) } }
const matchMedia = () => ({ matches: true }) // an epoch without pauses
const press = id => { page[id].onclick(); return page.said.textContent }
const slide = (id, value) => page[id].oninput({ target: { value: String(value) } })
"""
SIGHTS = {
    "npid": 'press("try-0"); return press("step-npid")',
    "corrected": 'press("try-0"); return press("step-corrected")',
    "drawn": 'press("try-0"); return page.rows.html.match(/var\\(--(pull|push)\\)" stroke-width="3"/g)',
    "far side": 'press("try-1"); const w = state.W[3]; press("step-corrected"); return angle(w, state.W[3])',
    "m = 0.3": 'press("try-1"); return press("epoch")',
    "m = 0.75": 'press("try-1"); slide("m", 0.75); return press("epoch")',
    "temperature": 'press("try-2"); press("find"); return [page.verdict.textContent, page.alike.html]',
    "far temperature": 'slide("lam", 20); slide("T", 1); return [page.verdict.textContent, page.alike.html]',
    "random": 'press("try-3"); return [press("epoch"), press("epoch"), press("epoch")]',
    "forward": 'press("try-3"); press("start-forward"); return page.said.textContent',
    "keys": 'const z = state.z; page.z.onkeydown({ key: "ArrowLeft", preventDefault() {} }); return angle(z, state.z)',
    "image": 'page.image.onchange({ target: { value: "7" } }); press("look"); return angle(state.z, point(WORLD[7]))',
    "rule": 'page.npid.onchange(); return page.rows.html.includes("--push")',
    "last rule": 'page.npid.onchange(); press("step-corrected"); return page.rows.html.includes("--push")',
    "age": 'for (let i = 0; i < 20; i++) press("age"); return page.ages.attributes["aria-label"]',
}


def unit_rows(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def draw_cases() -> list[dict]:
    """Random banks and batches, some views share an image, and two rows that vanish unguarded."""
    torch.manual_seed(0)
    cases = []
    for m in (0, 0.3, 0.5, 0.75, 1):
        for n, dim, views, tau, lam, temperature in (
            (5, 2, 1, 0.2, 0.5, 0.2),
            (12, 8, 6, 0.4, 3, 1),
            (9, 3, 4, 1, 1, 1),
        ):
            W, z, y = unit_rows(n, dim), unit_rows(views, dim), torch.randint(n, (views,))
            y[views // 2] = y[0]
            cases.append({"W": W, "z": z, "y": y, "m": m, "tau": tau, "lam": lam, "T": temperature})
    W = torch.eye(3, dtype=torch.float64)
    guards = ((-W[1:2], {"m": 0.5, "tau": 0.2}), (W[1:2], {"m": 0, "tau": 1 / 29}))  # z = -w, and P around 1e-13
    for z, guard in guards:
        cases.append({"W": W, "z": z, "y": torch.tensor([1]), "lam": 2, "T": 0.5} | guard)
    return cases


CASES = draw_cases()
COMPUTE = """({ W, z, y, m, tau, lam, T }) => {
  const views = z.map((z, i) => ({ z, y: y[i] })), s = z.map(z => cosines(z, W))
  const unit = W.map((_, i) => W.map((_, j) => +(i === j)))
  return {
    nce: s.map((s, i) => nce(s, y[i], tau)), sqrtKl: s.map(s => sqrtKl(s, T)), u: s.map(s => flattened(s, T)),
    P: s.map(s => softmax(scale(s, 1 / tau))), atView: s.map((s, i) => atView(lossGradient(s, y[i], tau, lam, T), W)),
    npid: updateNpid(W, views, m), corrected: updateCorrected(W, views, m, tau),
    entropy: s.map(s => entropy(softmax(s))),
    tauAtView: bestTau(s[0], W, y[0], tau, lam, T), tauByRow: bestTau(s[0], unit, y[0], tau, lam, T),
  }
}"""


@pytest.fixture(scope="module")
def answers() -> dict:
    """All that the page computes for CASES and SIGHTS, from one call of node."""
    plain = [{k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in case.items()} for case in CASES]
    pressed = ",".join(f"{json.dumps(name)}: (() => {{ {code} }})()" for name, code in SIGHTS.items())
    output = f"{{ cases: {json.dumps(plain)}.map({COMPUTE}), sights: {{ {pressed} }} }}"
    source = (
        f"const IDS = {json.dumps(sorted(IDS))}\n{BROWSER}\n{MATHS}\n{SCRIPT}\nconsole.log(JSON.stringify({output}))"
    )
    done = subprocess.run(["node", "-"], input=source, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def pairs(answers):
    return zip(CASES, answers["cases"])


def same(numbers, expected):
    torch.testing.assert_close(torch.tensor(numbers, dtype=torch.float64), expected, rtol=1e-6, atol=1e-6)


@needs_node
def test_the_losses_are_those_of_loss_py(answers):
    for case, answer in pairs(answers):
        s = case["z"] @ case["W"].T
        for i in range(len(s)):
            same(answer["nce"][i], nce(s[i : i + 1], case["y"][i : i + 1], case["tau"]))
            same(answer["sqrtKl"][i], sqrt_kl(s[i : i + 1], case["T"]))
        same(answer["P"], (s / case["tau"]).softmax(1))
        root = (s / case["T"]).softmax(1).sqrt()
        same(answer["u"], root / root.sum(1, keepdim=True))
        same(answer["entropy"], -(s.softmax(1) * s.log_softmax(1)).sum(1))


@needs_node
def test_the_gradient_at_z_is_autograds(answers):
    for case, answer in pairs(answers):
        z = case["z"].clone().requires_grad_()
        s = z @ case["W"].T
        loss = nce(s, case["y"], case["tau"]) + case["lam"] * sqrt_kl(s, case["T"])
        (gradient,) = torch.autograd.grad(len(z) * loss, z)  # the mean's, as each view's own
        same(answer["atView"], gradient)


@needs_node
@pytest.mark.parametrize("rule", ["npid", "corrected"])
def test_both_rules_are_those_of_the_bank(answers, rule):
    for case, answer in pairs(answers):
        bank = MemoryBank(*case["W"].shape, case["m"], rule, case["tau"]).double()
        bank.weight.copy_(case["W"])
        bank.update(case["z"], case["y"])
        same(answer[rule], bank.weight)


def best_temperature(s, target, rows, loss) -> float:
    """The tau' in [0.01, 10] whose gradient of nce, as a sum of rows, is nearest to loss's."""

    def direction(value):
        return F.normalize(torch.autograd.grad(value, s, retain_graph=True)[0][0] @ rows, dim=0)

    goal = direction(loss)
    low, high = torch.tensor([0.01, 10.0], dtype=torch.float64).log()
    for points in (200, *[21] * 9):
        grid = torch.linspace(float(low), float(high), points, dtype=torch.float64)
        miss = [float((direction(nce(s, target, float(x.exp()))) - goal).norm()) for x in grid]
        best = miss.index(min(miss))
        low, high = grid[max(best - 1, 0)], grid[min(best + 1, points - 1)]
    return float(grid[best].exp())


@needs_node
def test_the_best_temperature_is_what_a_search_with_autograd_finds(answers):
    inside = 0
    for case, answer in list(pairs(answers))[:-2:2]:
        s, target = (case["z"][:1] @ case["W"].T).requires_grad_(), case["y"][:1]
        loss = nce(s, target, case["tau"]) + case["lam"] * sqrt_kl(s, case["T"])
        for name, rows in (("tauAtView", case["W"]), ("tauByRow", torch.eye(len(case["W"]), dtype=torch.float64))):
            expected = best_temperature(s, target, rows, loss)
            if expected < 0.02:  # so cold that the direction hardly depends on the temperature
                assert answer[name] < 0.02
            else:
                assert answer[name] == pytest.approx(expected, rel=1e-6), (name, case["tau"], case["lam"])
                inside += 1
    assert inside >= 8


@pytest.mark.parametrize(
    ("largest", "tau", "T", "lam", "detach", "half_or_quarter"),
    [(0.02, 0.5, 1, 1, True, 2), (0.02, 1, 1, 0.5, False, 4), (1, 0.2, 0.2, 1e-3, True, 2)],
)
def test_the_formula_for_the_best_temperature_holds_where_the_page_says(largest, tau, T, lam, detach, half_or_quarter):
    """Small logits, or T = tau and a small lambda."""
    torch.manual_seed(0)
    s = (largest * unit_rows(1, 5) @ unit_rows(10, 5).T).requires_grad_()
    target = torch.tensor([3])
    loss = nce(s, target, tau) + lam * sqrt_kl(s, T, detach=detach)
    found = best_temperature(s, target, torch.eye(10, dtype=torch.float64), loss)
    assert 1 / found - 1 / tau == pytest.approx(lam * tau / (half_or_quarter * T**2), rel=0.05)


def numbers(words: str) -> list[float]:
    return [float(x) for x in re.findall(r"\d+(?:\.\d+)?", words)]


@needs_node
def test_npid_moves_one_row_and_the_corrected_rule_all(answers):
    sights = answers["sights"]
    assert "moved 1 of 10 rows" in sights["npid"] and "moved 10 of 10 rows" in sights["corrected"]
    assert sights["drawn"][0].count("pull") + sum("push" in arrow for arrow in sights["drawn"]) >= 5


@needs_node
def test_m_below_a_half_throws_rows_about(answers):
    sights = answers["sights"]
    assert sights["far side"] > 90
    low, high = (numbers(sights[name]) for name in ("m = 0.3", "m = 0.75"))
    assert low[0] > 5 * low[1] and low[2] > 90  # degrees from the images, after and before; the largest turn
    assert high[0] <= high[1] + 1 and high[2] < 10


@needs_node
def test_sqrt_kl_is_like_another_temperature_only_near_the_formula(answers):
    for name, least, most in (("temperature", 0.9999, 1.0), ("far temperature", 0.85, 0.95)):
        verdict, table = answers["sights"][name]
        found, formula = numbers(verdict)
        at_tau, at_other = numbers(re.sub("<[^>]*>", " ", table))[:2]
        assert least <= at_other <= most and at_tau < at_other and 0.8 < found / formula < 1


@needs_node
def test_the_forward_pass_is_the_better_start(answers):
    after = [numbers(words)[0] for words in answers["sights"]["random"]]
    before = numbers(answers["sights"]["random"][0])[1]
    assert all(0.4 < b / a < 0.6 for a, b in zip([before, *after], after))  # halved by every visit, but for noise
    assert numbers(answers["sights"]["forward"])[0] < after[-1]


@needs_node
def test_the_other_controls_work_too(answers):
    sights = answers["sights"]
    assert sights["keys"] == pytest.approx(2)
    assert sights["image"] < 30
    assert not sights["rule"] and sights["last rule"]  # whether there are arrows that push
    steps, n, random_order, w, window = numbers(sights["age"])
    assert steps == 2200 and random_order == pytest.approx(n, rel=0.05) and window == pytest.approx(w, rel=0.05)


def test_the_page_is_one_file_that_asks_nothing_of_the_network():
    assert len(PAGE.splitlines()) <= 500
    assert re.findall(r"https?://[^\s\"'<]*", PAGE) == ["https://arxiv.org/abs/2404.19289"]
    assert not re.search(r"<link|<iframe|<img|\bsrc=|@import|url\((?!#)|\bfetch\(|XMLHttpRequest|\bimport\b", PAGE)
    for target in re.findall(r'href="([^":]+)"', PAGE):
        assert (Path(__file__).parent.parent / "docs" / target).is_file(), target


def test_every_id_that_is_named_exists():
    named = set(re.findall(r'(?:\bfor|aria-controls)="([\w-]+)"', PAGE)) | set(re.findall(r'\$\("([\w-]+)"\)', SCRIPT))
    assert named and not named - IDS
    body = PAGE.partition("<script")[0]
    assert len(re.findall(r'\bid="', body)) == len(IDS)  # none twice
    labelled = set(re.findall(r'<label for="([\w-]+)"', body)) | {"npid", "corrected"}  # these stand inside theirs
    assert set(re.findall(r'<(?:input|select)[^>]* id="([\w-]+)"', body)) == labelled
