"""The report of a folder: one file that asks for nothing, tells of damage, and takes no text for a program."""
import base64
import re

import pytest

from commands import attnnas
from attnnas.cells.derivation import random_cell
from attnnas.core.errors import AttnnasError
from attnnas.evidence import batch
from attnnas.evidence.config import RunConfig
from attnnas.evidence.insertions import GivenCell
from attnnas.evidence.report import html_report, write_report
from attnnas.evidence.run import key_of
from attnnas.evidence.sources import Generated
from attnnas.evidence.store import RunRecord, Store

HOSTILE = "</td><script src=//evil.example/x.js></script><img src=x onerror=alert(1)>"
CELL = random_cell(0, 1, alpha=1, beta=1, width=4).cell
DATA = Generated(frames=4, size=16, train_clips=8, validation_clips=4, test_clips=4)
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


def config(seed: int) -> RunConfig: return RunConfig(DATA, insertion=GivenCell(CELL), seed=seed)


def made_up(seed: int, accuracy: float | None, reason: str | None = None) -> RunRecord:
    own = config(seed)
    test = None if accuracy is None else {"top1": accuracy, "top5": 90., "loss": 1., "count": 4, "by": {}}
    history = [{"epoch": n, "loss": 2 - n / 2, "top1": 30. * n, "validation": {}} for n in range(3)]
    return RunRecord(key_of(own), own.to_dict(), "finished" if reason is None else "diverged", reason, test, history, 1234, .5,
                     {"wall": 7200., "cpu": 3600.}, None, HOSTILE, 1, {"torch": HOSTILE},
                     {"fingerprint": own.data.fingerprint, "train_clips": 8, "validation_clips": 4}, "abc",
                     {"stage2": CELL.to_dict()}, "2026-01-01T00:00:00+00:00")


@pytest.fixture
def store(tmp_path):
    "Two finished seeds, one that diverged, one damaged record, one run begun, hostile texts, a picture."
    store = Store(tmp_path / "mine")
    for record in (made_up(0, 61.), made_up(1, 72.), made_up(2, None, f"loss is nan {HOSTILE}")): store.put(record)
    for name in ("0damaged", "1begun"): store.path(name).parent.mkdir()
    store.path("0damaged").write_text('{"schema_version": 2, "key": ')
    folder = store.made("quick")
    (folder / "claims.md").write_text(f"## Claims\n\n| a | b |\n|:--|:--|\n| {HOSTILE} | held |\n\n![p](http://evil.example/p.png) "
                                      "[click](javascript:alert(1)) <https://evil.example>\n")
    (folder / "table_1.png").write_bytes(PIXEL)
    return store


def programs(page: str) -> list:
    "What a browser would fetch or run."
    return re.findall(r"<script|<img[^>]*\bonerror|<link|<iframe|@import|url\(|(?:src|href)=[\"'](?!data:image/|#)[^\"']*", page)


def test_one_file_asks_for_nothing_and_runs_nothing(store, tmp_path):
    before = sorted(store.folder.rglob("*"))
    path = write_report(store, tmp_path / "out" / "report.html")
    page = path.read_text(encoding="utf-8")
    assert programs(page) == [] and "http://" not in page.replace("http://evil", "") and "default-src 'none'" in page
    assert programs('<img src="p.png">') and programs('<a href="http://x">') and programs("<script>"), "the test can fail"
    assert page.count("&lt;script src=//evil.example") >= 4, "device, versions, reason and claim are shown as text"
    assert [p.name for p in path.parent.iterdir()] == ["report.html"] and sorted(store.folder.rglob("*")) == before
    assert base64.b64encode(PIXEL).decode() in page and str(tmp_path) not in page


def test_what_failed_is_told_and_numbers_are_those_of_the_records(store):
    page = html_report(store, failed=["table_9 lacks a run"])
    sections = dict(re.findall(r'<section id="(.*?)">(.*?)</section>', page, re.S))
    assert list(sections) == ["claims", "tables", "best-cells", "curves", "costs", "what-failed", "runs", "provenance"]
    failed = sections["what-failed"]
    assert failed.count("<tr>") == 1 + 4, "one that diverged, one damaged, one begun, and the message"
    for told in ("runs/0damaged/record.json", "1begun", "loss is nan", "table_9 lacks a run"): assert told in failed
    assert ">66.5<" in sections["best-cells"] and CELL.hash[:8] in sections["best-cells"]
    assert sections["best-cells"].count("<img") == 1 and sections["curves"].count("<img") == 1
    assert sections["runs"].count("<tr>") == 1 + 3 and re.search(r"<td[^>]*>all</td>.*>3<.*>6<.*>3<", sections["costs"])


def test_a_batch_shows_its_own_runs_and_names_those_without_a_record(store):
    page = html_report(store, ["quick"], [config(0), config(7)])
    runs, failed = (re.search(f'<section id="{name}">(.*?)</section>', page, re.S)[1] for name in ("runs", "what-failed"))
    assert key_of(config(0)) in runs and key_of(config(1)) not in runs
    assert config(7).label in failed and config(0).label not in failed
    none = html_report(store, ["quick"], [config(7)])
    assert key_of(config(0)) not in none and config(7).label in none


def test_small_and_dark_screens_are_meant(store):
    page = html_report(store)
    assert 'content="width=device-width' in page and "prefers-color-scheme: dark" in page
    assert page.count("<table>") == page.count('<div class="box"><table>') > 4, "a table scrolls in a box of its own"


def test_the_command_writes_it_and_refuses_what_is_no_folder_of_runs(store, tmp_path, capsys):
    code, out, err = attnnas(capsys, "report", store.folder)
    assert (code, err) == (0, "") and "report.html" in out and (store.folder / "report.html").is_file()
    code, out, _ = attnnas(capsys, "report", store.folder, "--out", tmp_path / "a.html")
    again = (tmp_path / "a.html").read_bytes()
    assert code == 0 and again == (store.folder / "report.html").read_bytes(), "a page is the same at each writing"
    (tmp_path / "empty").mkdir()
    for wrong, told in ((tmp_path / "nowhere", "is no folder"), (tmp_path / "empty", "nothing to report")):
        code, _, err = attnnas(capsys, "report", wrong)
        assert code == 2 and told in err and not (wrong / "report.html").exists()


def test_a_batch_writes_it_at_its_end_also_where_a_part_failed(tmp_path, monkeypatch):
    def fails(*arguments): raise AttnnasError("the template broke")
    monkeypatch.setattr(batch, "_make_notebook", fails)
    monkeypatch.setattr(batch, "check_parameters", lambda path, parameters: None)  # imports nbformat, 5 s
    with pytest.raises(AttnnasError, match="the template broke"):
        batch.reproduce("smoke", tmp_path, ["figure_cells"], device="cpu", rebuild=True, show=False)
    assert "the template broke" in (tmp_path / "smoke" / "report.html").read_text(encoding="utf-8")
