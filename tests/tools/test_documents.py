"""What the documents say of the code holds: paths exist, the walk is true, keys have the stated defaults."""

import ast
import csv
import re
from pathlib import Path

import pytest
import yaml

from bench.rows import read_csv
from pact_fast import config as configs
from pact_fast import metrics
from pact_fast.evaluation.stats import paired_difference
from pact_fast.objective import PRESETS

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FILE = re.compile(
    r"(?:pact_fast|kernels|tests|bench|configs|csrc|docs|examples|scripts)/[\w./-]*\.(?:py|md|csv|yaml|cpp|sh|txt|png|svg)"
)
MODULE = re.compile(r"\bpact_fast(?:\.[a-z_]\w*)+")


def section(page, title):
    return re.split(r"^## ", page, flags=re.M)[[*re.findall(r"^## (.*)$", page, flags=re.M)].index(title) + 1]


def table(text):
    """Rows of the table of a section, its header left out; cells without backquotes."""
    rows = [
        line.strip("|").split("|") for line in re.sub(r"\\\|", "/", text).splitlines() if line.startswith("|")
    ]
    return [[cell.strip() for cell in row] for row in rows[2:]]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_files_and_links_that_a_page_names_exist(page):
    text = page.read_text()
    gone = [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    links = [target for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in target]
    gone += [target for target in links if not (page.parent / target).exists()]
    assert not gone, f"{page.name} names what is not there: {gone}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_modules_that_a_page_names_exist(page):
    for name in MODULE.findall(page.read_text()):
        parts = name.split(".")
        path = ROOT.joinpath(*parts)
        is_module = path.is_dir() or path.with_suffix(".py").exists()
        parent = path.parent
        source = next((p for p in (parent.with_suffix(".py"), parent / "__init__.py") if p.is_file()), None)
        assert is_module or (source and re.search(rf"\b{parts[-1]}\b", source.read_text())), (
            f"{page.name}: {name}"
        )


def test_comments_name_files_that_exist():
    gone = []
    for folder in ("pact_fast", "kernels", "csrc", "bench", "configs", "scripts", "examples"):
        for path in [p for end in ("py", "cpp", "yaml", "sh") for p in (ROOT / folder).rglob(f"*.{end}")]:
            names = (
                FILE.findall(path.read_text())
                if "kernels" not in path.parts[:-1] or folder == "kernels"
                else []
            )
            gone += [f"{path.relative_to(ROOT)}: {name}" for name in names if not (ROOT / name).exists()]
    assert not [line for line in gone if "bench/results/" not in line], gone  # those are made by the benches


def test_the_walk_names_at_most_nine_files_in_which_its_functions_stand():
    walk = table(section((ROOT / "docs" / "index.md").read_text(), "A walk"))
    files = [row[1].strip("`") for row in walk]
    assert 5 <= len(files) == len(set(files)) <= 9
    for name, what in ((row[1].strip("`"), row[2]) for row in walk):
        tree = ast.parse((ROOT / name).read_text())
        defined = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
        defined |= {
            t.id
            for n in ast.walk(tree)
            if isinstance(n, ast.AnnAssign) and isinstance(t := n.target, ast.Name)
        }
        named = [word for quoted in re.findall(r"`([\w.]+)`", what) for word in quoted.split(".")]
        assert named, f"{name}: no function named"
        assert not set(named) - defined, f"{name} does not define {sorted(set(named) - defined)}"


def test_keys_of_the_method_have_the_stated_defaults_and_none_of_the_objective_is_missing():
    page = (ROOT / "docs" / "method.md").read_text()
    stated = {row[2].strip("`"): row[3].strip("`") for row in table(section(page, "Keys and equations"))}
    values = configs.Config().to_dict()
    real = {key: values[key.split(".")[0]].get(key.split(".")[1]) for key in configs.all_keys() if "." in key}
    wrong = {
        key: f"stated {text}, is {real.get(key, 'no key')}"
        for key, text in stated.items()
        if text != str(real.get(key, "no key"))
    }
    assert not wrong, f"docs/method.md, the table of keys: {wrong}"
    missing = [key for key in real if key.startswith("objective.") and key not in stated]
    assert not missing, f"docs/method.md, the table of keys lacks {missing}"


def test_presets_and_metrics_of_the_method_are_the_codes():
    page = (ROOT / "docs" / "method.md").read_text()
    assert {row[0].strip("`") for row in table(section(page, "Presets"))} == set(PRESETS)
    named = [
        name for row in table(section(page, "What is measured")) for name in re.findall(r"`([^`]+)`", row[0])
    ]
    assert named
    assert not [name for name in named if name not in metrics.METRICS]


def test_code_cites_the_method_by_sections_that_exist():
    titles = re.findall(r"^## (.*)$", (ROOT / "docs" / "method.md").read_text(), flags=re.M)
    cited = 0
    for path in [*(ROOT / "pact_fast").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        text = path.read_text()
        assert not re.search(r"\bMETHOD\b(?! ?=)", text), (
            f"{path} cites METHOD, which is not in the repository"
        )
        for title in re.findall(r'docs/method\.md,\s+"([^"]+)"', text):
            assert title in titles, f"{path}: docs/method.md has no section {title!r}"
            cited += 1
    assert cited


def test_the_changelog_has_every_renamed_name():
    text = (ROOT / "CHANGELOG.md").read_text()
    for old, new in (configs.RENAMED_KEYS | metrics.RENAMED).items():
        assert f"| `{old}` | `{new}` |" in text, f"CHANGELOG.md does not say that {old} is {new} now"


def test_project_files_agree_on_licence_and_version():
    from pact_fast import __version__

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["license"] == "Apache-2.0"
    assert "2606.16215" in citation["references"][0]["identifiers"][0]["value"]
    licence = (ROOT / "LICENSE").read_text()
    assert "SPDX-License-Identifier: Apache-2.0" in licence
    assert "https://www.apache.org/licenses/LICENSE-2.0" in licence
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {repo["repo"] for repo in hooks} == {"local"}


def rows_named(cell):
    """CSV rows of bench/results/ that the last cell of a row of the speed table names."""
    rows = read_csv(ROOT / "bench" / "results")
    for name in re.findall(r"`([^`]+)`", cell):
        op, mode, shape = (part.strip() for part in name.split(";"))
        found = [r for r in rows if (r["op"], r["mode"]) == (op, mode) and r["shape"].startswith(shape)]
        assert found, f"no CSV row for {name!r}"
        yield from (row for row in found if "H100" in row["gpu"])


def test_every_number_of_the_speed_table_has_a_csv_row():
    lines = [
        line.strip("|").split("|")
        for line in section((ROOT / "README.md").read_text(), "Speed").splitlines()
        if line.startswith("| ")
    ][1:]
    assert len(lines) >= 8
    checked = 0
    for what, *cells, names in lines:
        rows = list(rows_named(names))
        for number, unit in re.findall(r"([\d,]+(?:\.\d+)?) (ms|GiB|TFLOP/s)", " ".join(cells)):
            value = float(number.replace(",", ""))
            half = 0.5 * 10.0 ** -len(number.partition(".")[2]) + 1e-9
            near = [r for r in rows if r["unit"] == unit and abs(float(r["p50"]) - value) <= half]
            assert near, f"README, {what.strip()}: no row of {number} {unit} among {names.strip()}"
            checked += 1
    assert checked >= 25


def test_no_page_says_that_the_gpu_was_never_measured():
    for page in [*PAGES, ROOT / "bench" / "LOG.md"]:
        text = " ".join(page.read_text().split())
        stale = re.search(r"has not been measured|Nothing has been timed on a GPU|No GPU could be had", text)
        assert not stale, f"{page.name}: {stale[0]}"


@pytest.mark.parametrize(
    ("name", "pairs"),
    [
        (
            "table2",
            [
                ("pact-no-sft", "matchtir", "sampled"),
                ("prompt-rl+sft", "matchtir", "sampled"),
                ("prompt-rl+sft", "pact-no-anchor", "sampled"),
                ("pact-no-anchor", "pact-no-sft", "sampled"),
                ("pact", "sft-then-matchtir", "sampled"),
                ("pact", "matchtir", "sampled"),
                ("pact-toolbox", "prompt-rl+sft", "sampled"),
            ],
        ),
        ("contexts", [("sdar", "grpo", "sampled"), ("rlcsd", "grpo", "sampled")]),
        (
            "turns",
            [
                ("opsd", other, mode)
                for other in ("matchtir", "prompt-rl+sft")
                for mode in ("sampled", "greedy")
            ],
        ),
    ],
)
def test_differences_that_the_results_state_are_those_of_the_runs(name, pairs):
    """Mean and 95% interval over the seeds that both presets have, from docs/<name>-runs.csv."""
    page = " ".join((ROOT / "docs" / "results.md").read_text().split())
    rows = list(csv.DictReader((ROOT / "docs" / f"{name}-runs.csv").open()))
    for one, other, mode in pairs:
        solved = [
            {r["seed"]: float(r["solved"]) for r in rows if (r["preset"], r["mode"]) == (preset, mode)}
            for preset in (one, other)
        ]
        both = solved[0].keys() & solved[1].keys()
        d = paired_difference(*({seed: side[seed] for seed in sorted(both)} for side in solved))
        text = f"{d.mean:+.2f} [{d.low:+.2f}, {d.high:+.2f}]"
        assert text.removeprefix("+") in page, (
            f"{one} minus {other}, {mode}: {text} is not in docs/results.md"
        )
