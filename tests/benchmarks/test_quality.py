"""Quality on trained models: what is asked, what is computed of the answers, and the page of the results."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import einfold
from benchmarks import fetch, methods, real_model
from benchmarks.quality import __main__ as command
from benchmarks.quality import measure, pages, sets, subjects
from benchmarks.quality.intervals import of_mean, of_share
from benchmarks.quality.measure import Original, figures, hits, shares
from benchmarks.quality.subjects import Questions, Subject, list_of_things
from einfold.compiler.recipe import Recipe
from einfold.runtime.tokenizer import Tokenizer
from tests import models


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EINFOLD_CACHE", str(tmp_path))
    return tmp_path / "benchmarks"


@pytest.fixture(scope="module")
def subject(text_model: Path) -> Subject:
    """Windows of random tokens; the first question has the model's own answer, the second another."""
    random = np.random.default_rng(0)
    windows = [random.integers(3, 200, 40).tolist() for _ in range(2)]
    tokens = random.integers(3, 200, 30).tolist()
    original = measure.load_reference(measure.find_model(text_model))
    with torch.no_grad():
        tokens.append(int(original(torch.tensor([tokens])).logits[0, -1].argmax()))
        right = int(original(torch.tensor([tokens])).logits[0, -1].argmax())
    tokens.append(3 if right != 3 else 4)
    return Subject(
        "tiny", text_model, windows, [Questions(tokens, 30, (range(30, 31), range(31, 32)), 1000)]
    )


def test_figures_of_the_model_itself_and_of_a_coarse_one(
    subject: Subject,
    text_artifact: Path,
    tmp_path: Path,
    kept: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure, "PROMPT", 20)
    original = Original.of(subject)
    assert original.recalled == {1000: [True, False]}
    found = figures(einfold.load(text_artifact), subject, original)
    assert found["tokens"] == 2 * 19 and found["questions"] == 2
    assert 0 <= found["kl_max"] < 1e-5 and found["same"] == 1.0
    assert found["perplexity"] == pytest.approx(found["reference_perplexity"], rel=1e-5)
    assert found["recall"] == found["reference_recall"] == {"1000": 0.5}
    assert found["hits"] == found["reference_hits"] == {"1000": "10"}
    assert found["cache_bytes"] == found["full_cache_bytes"] and "read_bytes" not in found

    # Other benchmarks ask nothing, or ask by themselves.
    silent = figures(einfold.load(text_artifact), replace(subject, questions=[]), original)
    assert silent["kl"] == found["kl"] and silent["questions"] == 0

    einfold.compile(subject.folder, tmp_path / "coarse", weights="int2", check=False)
    coarse = figures(einfold.load(tmp_path / "coarse"), subject, original)
    assert coarse["kl_max"] > coarse["kl_p99"] > coarse["kl"] > 1e-3
    assert coarse["weight_bytes"] < found["weight_bytes"]
    assert len(coarse["kl_windows"]) == 2 and np.mean(coarse["kl_windows"]) == pytest.approx(
        coarse["kl"]
    )
    assert coarse["kl_windows"][0] != coarse["kl_windows"][1]


def test_bytes_that_a_step_reads_stand_beside_those_held(
    subject: Subject, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "PROMPT", 20)
    recipe = {"cache": {"read": {"method": "quest", "tokens": 12, "page": 4, "skip_layers": 0}}}
    einfold.compile(subject.folder, tmp_path / "read", recipe=recipe, check=False)
    found = figures(einfold.load(tmp_path / "read"), subject, Original.of(subject))
    assert found["read_bytes"]["4000"] < found["cache_bytes"]["4000"]
    row = found | {
        "cache_bytes": {"1000": 2_000_000},
        "read_bytes": {"1000": 500_000},
        "full_cache_bytes": {"1000": 1_000_000},
    }
    assert "| 2.0 MB (2.00); a step reads 0.5 MB (0.50) |" in pages.cells(row)


def test_what_the_original_says_is_kept_for_one_model_and_one_text(
    subject: Subject, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "PROMPT", 20)
    first = Original.of(subject)
    monkeypatch.setattr(measure, "load_reference", lambda source: pytest.fail("loaded again"))
    again = Original.of(subject)
    assert all(np.array_equal(a, b) for a, b in zip(first.windows, again.windows, strict=True))
    other = Subject("tiny", subject.folder, subject.windows[:1], subject.questions)
    with pytest.raises(pytest.fail.Exception):
        Original.of(other)


@pytest.mark.slow
def test_a_row_says_what_compiling_it_takes_and_what_a_token(
    subject: Subject, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "PROMPT", 20)
    original = Original.of(subject)
    row = command.measure_row(sets.Row("int8", {"weights": "int8"}), subject, original, 1)
    assert row["compile_seconds"] > 0.01 and 5e7 < row["compile_bytes"] < 5e10
    assert row["milliseconds"]["prompt"] > 0 and row["milliseconds"]["token"] > 0
    assert row["kl_p99"] <= row["kl_p999"] <= row["kl_max"]
    bits = row["weight_bytes"] * 32 / (2 * row["weight_bytes"])
    assert f"MB ({bits:.2f}) |" in pages.cells(row, 2 * row["weight_bytes"])
    wrong = sets.Row("wrong", {"cache": {"quant": {"method": "kivi"}}})  # not for onnx
    assert "onnx" in command.measure_row(wrong, subject, original, 1)["refused"]


def test_shares_by_label() -> None:
    asked = [
        (Questions([5, 6, 7, 8], 2, (range(2, 4),), 1000), np.array([7, 8, 0])),
        (Questions([5, 6, 7, 8], 2, (range(2, 4),), 1000), np.array([7, 9, 0])),
        (Questions([5, 6, 7, 8], 2, (range(2, 3), range(3, 4)), 4000), np.array([0, 8, 0])),
    ]
    assert hits(asked) == {1000: [True, False], 4000: [False, True]}
    assert shares(hits(asked)) == {1000: 0.5, 4000: 0.5}


def test_intervals_are_those_of_the_literature() -> None:
    """Wilson's of 15 of 50 and of none of 10, as Agresti and Coull (1998) and statsmodels give them."""
    assert of_share(15, 50) == pytest.approx((0.1910, 0.4375), abs=1e-4)
    assert of_share(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert of_share(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert of_mean([2.0] * 8) == (2.0, 2.0)
    values = np.random.default_rng(1).normal(5, 2, 400).tolist()
    low, high = of_mean(values)  # of many values the normal interval
    half = 1.96 * np.std(values) / 20
    assert (low, high) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=0.02)
    assert of_mean([0.0, 1.0]) == (0.0, 1.0)


def test_intervals_stand_where_they_are_known() -> None:
    row = {
        "recall": {"1000": 0.3, "4000": 1.0},
        "reference_recall": {"1000": 0.5, "4000": 1.0},
        "hits": {"1000": "1" * 15 + "0" * 35, "4000": "1" * 10},
        "kl": 0.02,
        "kl_windows": [0.02, 0.02],
    }
    assert pages.sure_recall(row) == "0.30 [0.19, 0.44] (0.50); 1.00 [0.72, 1.00] (1.00)"
    assert pages.sure_kl(row) == "2.0e-02 [2.0e-02, 2.0e-02]"
    old = {key: row[key] for key in ("recall", "reference_recall", "kl")}
    assert pages.sure_recall(old) == pages.recall(row) == "0.30 (0.50); 1.00 (1.00)"
    assert pages.sure_kl(old) == "2.0e-02"


def test_every_thing_of_the_lists_is_asked_for_behind_them() -> None:
    tokenizer = Tokenizer(methods.MODEL)
    prose = iter(f"Line {i} of a long text that says nothing of things." for i in range(10_000))
    asked = list_of_things(tokenizer.encode, prose, 1000, 1)
    text = tokenizer.decode(asked.tokens[: asked.prompt])
    assert 1000 <= asked.prompt < 1150 and text.count("Where things are:") == 5
    for answer in asked.answers:
        before = tokenizer.decode(asked.tokens[asked.prompt : answer.start]).rpartition("\n")[2]
        place = tokenizer.decode(asked.tokens[answer.start : answer.stop])
        assert f"\n{before}{place}\n" in text  # "umbrella:" and " garage"
    assert len(asked.answers) == 20
    other = list_of_things(tokenizer.encode, iter(["x"] * 2000), 100, 2)
    assert tokenizer.decode(other.tokens)[:200] != text[:200]


def test_answers_stand_in_the_quarters_that_the_page_says() -> None:
    tokenizer = Tokenizer(methods.MODEL)
    prose = iter(f"Line {i} of a long text that says nothing of things." for i in range(10_000))
    asked = [
        list_of_things(tokenizer.encode, prose, length, seed) for length, seed in subjects.LISTS
    ]
    for label in (1000, 4000):
        found = []
        for questions in asked:
            if questions.label != label:
                continue
            lists = tokenizer.decode(questions.tokens[: questions.prompt]).split(
                "Where things are:"
            )
            assert not lists[0] and not lists[-1].strip()
            for answer in questions.answers:
                line = tokenizer.decode(questions.tokens[: answer.stop]).rpartition("\n")[2]
                found.append([f"\n{line}\n" in part for part in lists[1:-1]].index(True))
        assert subjects.quarters(label) == found
    # All of the last quarter of lists over 4,000 tokens, and all but one of the first.
    hits = {"1000": "0" * 40, "4000": ""}
    for place, quarter in enumerate(found):
        hits["4000"] += str(int((quarter == 0 and place != found.index(0)) or quarter == 3))
    assert pages.by_depth(hits) == "0 | 0 | 0 | 0 | 4 | 0 | 0 | 5"


def test_the_toy_reads_whole_windows_and_its_own_keys() -> None:
    toy = subjects.toy()
    assert [len(window) for window in toy.windows] == [subjects.WINDOW] * 8
    assert len(toy.questions) == 28
    for questions in toy.questions:
        (answer,) = questions.answers
        assert questions.prompt < answer.start and answer.stop == len(questions.tokens)


@pytest.mark.parametrize("name", sets.SETS)
def test_rows_are_recipes_of_different_names(name: str) -> None:
    rows = sets.SETS[name]
    assert len({row.name for row in rows}) == len(rows)
    for row in rows:
        Recipe.build(row.table)


def test_off_the_grid_is_the_same_function() -> None:
    model = models.build("llama").eval()
    tokens = torch.arange(3, 23)[None]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        wanted = model(tokens).logits
        real_model.off_grid(model)
        found = model(tokens).logits
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=2e-5)
    moved = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    for part in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert any(part in name for name in moved), part


def test_a_run_goes_on_where_it_was_stopped(
    subject: Subject, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "PROMPT", 20)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    refused = sets.Row("refused", {"cache": {"quant": {"method": "kivi"}}})
    monkeypatch.setitem(command.SETS, "quick", (sets.Row("float32"), refused))
    monkeypatch.setitem(command.SUBJECTS, "toy", lambda: subject)
    monkeypatch.setattr(command, "ProcessPoolExecutor", lambda one, _: ThreadPoolExecutor(one))
    command.run("quick", "toy", None, False, 1)
    path = pages.results("quick", "toy")
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == ["float32", "refused"] and rows["float32"]["tokens"] == 38
    assert "no operator that reads" in rows["refused"]["refused"]
    rows["float32"]["tokens"] = 1
    path.write_text(json.dumps({"rows": {"float32": rows["float32"]}}))
    command.run("quick", "toy", None, False, 1)
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == ["float32", "refused"] and rows["float32"]["tokens"] == 1


def test_rows_are_measured_in_the_order_in_which_they_are_asked_for(
    subject: Subject, tmp_path: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "PROMPT", 20)
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    monkeypatch.setitem(command.SETS, "quick", tuple(sets.Row(name) for name in "abc"))
    monkeypatch.setitem(command.SUBJECTS, "toy", lambda: subject)
    measured = []

    def measure_row(row: sets.Row, *rest: Any) -> dict[str, Any]:
        measured.append(row.name)
        return {"refused": "here"}

    monkeypatch.setattr(command, "measure_row", measure_row)
    command.run("quick", "toy", ["c", "a"], False, 1)
    assert measured == ["c", "a"]
    rows = json.loads(pages.results("quick", "toy").read_text())["rows"]
    assert list(rows) == ["a", "c"]  # on the page as the set has them


def test_a_row_that_no_set_has_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["quality", "quick", "--only", "float32", "nothing"])
    with pytest.raises(SystemExit):
        command.main()
    assert "the set quick has no row nothing" in capsys.readouterr().err


def test_the_page_is_the_committed_results() -> None:
    """`make quality` and its longer forms write it; so does `python -m benchmarks.quality --page`."""
    assert pages.PAGE.read_text(encoding="utf-8") == pages.written()
    facts = methods.tomllib.loads(methods.FACTS.read_text(encoding="utf-8"))
    figures = json.loads((pages.ROOT / "benchmarks/results/methods-tiny_llama.json").read_text())
    assert methods.PAGE.read_text() == methods.page(facts, figures, methods.on_real_model())


def test_committed_rows_are_of_their_sets_and_measured() -> None:
    for name, known in sets.SETS.items():
        for model in subjects.SUBJECTS:
            rows = pages.read(pages.results(name, model))["rows"]
            assert set(rows) <= {row.name for row in known}, (name, model)
            refused = {label for label, row in rows.items() if "refused" in row}
            assert refused <= {"--prune kvzip:tokens=256,share=0.25 --quant kivi:bits=4"}
    for model in ("toy", "real"):
        assert pages.read(pages.results("quick", model))["rows"]["float32"]["kl_max"] < 1e-5


class _Index:
    """An index of packages with one file."""

    def __init__(self, file: str, data: bytes) -> None:
        self.file, self.data = file, data

    def __call__(self, url: str, timeout: float) -> Any:
        page = f'<a href="../../files/{self.file}#sha256=0">{self.file}</a>'.encode()
        return io.BytesIO(self.data if url.endswith(self.file) else page)


def _wheel() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("../outside/a.txt", "text")
    return packed.getvalue()


def _source() -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        link = tarfile.TarInfo("p/a.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        member = tarfile.TarInfo("p/data/a.txt")
        member.size = 4
        archive.addfile(member, io.BytesIO(b"text"))
    return packed.getvalue()


@pytest.mark.parametrize(
    ("file", "data"), [("p-1-py3-none-any.whl", _wheel()), ("p-1.tar.gz", _source())]
)
def test_members_of_a_package_are_fetched_by_name(
    file: str, data: bytes, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.urllib.request, "urlopen", _Index(file, data))
    package = fetch.Package("p", file, fetch.hashlib.sha256(data).hexdigest())
    folder = package.unpacked(("a.txt",))
    assert folder == kept / "p-1" and [x.name for x in folder.iterdir()] == ["a.txt"]
    assert (folder / "a.txt").read_text() == "text" and [x.name for x in kept.iterdir()] == ["p-1"]


@pytest.mark.parametrize(
    ("package", "what"),
    [
        (fetch.Package("p", "p-1.tar.gz", "0" * 64), "SHA-256"),
        (fetch.Package("p", "p-2.tar.gz", "0" * 64), "does not list it"),
    ],
)
def test_what_is_not_the_pinned_file_is_refused(
    package: fetch.Package, what: str, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch.urllib.request, "urlopen", _Index("p-1.tar.gz", _source()))
    with pytest.raises(fetch.FetchError, match=what):
        package.unpacked(("a.txt",))
    assert list(kept.iterdir()) == []


def test_no_network_is_said_with_what_to_do(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(url: str, timeout: float) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr(fetch.urllib.request, "urlopen", fail)
    with pytest.raises(fetch.FetchError, match=r"no route to host.*copy a.txt into .*p-1"):
        fetch.Package("p", "p-1.tar.gz", "0").unpacked(("a.txt",))


def test_of_two_that_make_a_folder_the_first_one_s_stays(tmp_path: Path) -> None:
    for name in ("made", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    fetch.publish(tmp_path / "made", tmp_path / "there")
    assert (tmp_path / "there" / "a.txt").read_text() == "there"
    with pytest.raises(OSError, match="nowhere"):
        fetch.publish(tmp_path / "nowhere", tmp_path / "gone")
