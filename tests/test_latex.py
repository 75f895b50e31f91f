"""LaTeX tables: nothing in other people's text reaches TeX as a command, and every row has its cells."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from assay.leaderboards.latex import latex
from assay.leaderboards.render import render
from assay.protocol import PROTOCOLS

zoo = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("record_zoo.py"))))
COMMANDS = {
    "textbackslash", "textasciicircum", "textasciitilde", "textless", "textgreater", "textbar", "char",
    "textasciigrave",
    "textendash", "textemdash", "ldots", "textquoteright", "textquoteleft", "textquotedblleft", "textquotedblright",
    "textsuperscript", "texttt", "ensuremath", "alpha", "beta", "gamma", "delta", "varepsilon", "lambda", "mu", "sigma",
    "tau", "varphi", "ell", "infty", "times", "le", "ge", "pm", "equiv", "cdot", "u", "r", "H", "v", "c",
}  # fmt: skip
"""What `latex` may use; none of them reads a file, writes one or defines anything."""
EVIL = (
    "\\input{/etc/passwd} \\write18{rm -rf} % $x^2$ & # _ ^^5cinput{x} ~ <b> {\\bf x} \\\\ \n\\end{tabular}\u202e\x00"
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("50 % of $5 & #1_a", r"50 \% of \$5 \& \#1\_a"),
        (r"\input{x}", r"\textbackslash{}input\{x\}"),
        ("^^5c", r"\textasciicircum{}\textasciicircum{}5c"),
        ("σ = .25, ×10⁴ ≤ ℓ∞", r"\ensuremath{\sigma} = .25, \ensuremath{\times}10\textsuperscript{4} \ensuremath{\le} "
                               r"\ensuremath{\ell}\ensuremath{\infty}"),
        ("Súkeník, Weiß", r"S\'{u}ken\'{i}k, Wei\texttt{U+00DF}"),
        ("a--b ,, ''", r"a-{}-b ,{}, '{}'"),
        ("中\u202e\x07\n文", r"\texttt{U+4E2D} \texttt{U+6587}"),
        ("[9cm]*", "{[}9cm{]}{*}"),
        ("?`!`", r"?\textasciigrave{}!\textasciigrave{}"),
    ],
)  # fmt: skip
def test_text_is_printed_as_it_is(text: str, expected: str) -> None:
    assert latex(text) == expected


@given(st.text(max_size=60))
@example(EVIL)
def test_no_text_reaches_tex_as_a_command(text: str) -> None:
    out = latex(text)
    assert out.isascii()
    assert out.isprintable()
    assert out.count("{") - out.count(r"\{") == out.count("}") - out.count(r"\}")
    assert "^^" not in re.sub(r"\\\^", "", out)
    # Without what `latex` itself writes, no character is left that means something to TeX.
    plain = re.sub(r"\\[{}$&#%_]", "", out)
    names = re.findall(r"\\([A-Za-z]+|.)", plain)
    assert {name for name in names if name not in "`'^~=.\""} <= COMMANDS
    assert not re.search(r"[$&#%_~^]", re.sub(r"\\[`'^~=.\"]\{", "{", plain))


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The LaTeX files of the boards `board` and `balls`, one of whose titles is hostile."""
    monkeypatch.setitem(PROTOCOLS, "test.1", zoo.PROTOCOL)  # type: ignore[misc]
    zoo.write_board(tmp_path)
    zoo.write_all(tmp_path)
    zoo.write_certified(tmp_path)
    title = EVIL.replace("\x00", "")[:110]
    zoo.write(tmp_path, "evil", 0.5, title=title)
    zoo.write(tmp_path, "evil", 0.5, on="balls", title=title, found=zoo.smoothed(0.5, 0.8))
    return {path.name: content.decode() for path, content in render(tmp_path).items() if path.suffix == ".tex"}


def test_every_row_has_a_cell_for_each_column(texts: dict[str, str]) -> None:
    assert set(texts) == {"board.tex", "balls.tex", "balls-certified.tex"}
    for text in texts.values():
        lines = [line for line in text.splitlines() if not line.startswith("%")]
        begin = re.fullmatch(r"\\begin\{tabular\}\{([lr]+)\}", lines[0])
        assert begin
        assert lines[-1] == r"\end{tabular}"
        rules = [line for line in lines if line in (r"\toprule", r"\midrule", r"\bottomrule")]
        assert (rules[0], rules[-1]) == (r"\toprule", r"\bottomrule")
        rows = [line for line in lines[1:-1] if line not in rules]
        assert len(rows) > 3
        for row in rows:
            assert row.endswith(r" \\")
            assert len(re.findall(r"(?<!\\)&", row)) == len(begin[1]) - 1
    assert r"\textbackslash{}input\{/etc/passwd\}" in texts["board.tex"]


def test_the_numbers_are_the_tables(texts: dict[str, str]) -> None:
    assert r"=1 & Trained & 100.0 & 80.0 [64.4, 90.9] & 80.0 & 80.0 & 1.32~M \\" in texts["board.tex"]
    # Known broken rows stand below a rule of their own, without a rank; what isn't ranked is absent.
    last = texts["board.tex"].split(r"\midrule")[-1]
    assert last.lstrip().startswith("& Quantised & ")
    assert "Partial" not in texts["board.tex"]
    assert r"Fair & " in texts["balls-certified.tex"]
    assert "Unsound" not in texts["balls-certified.tex"]


def test_a_long_title_stands_on_several_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROTOCOLS, "test.1", zoo.PROTOCOL)  # type: ignore[misc]
    zoo.write_board(tmp_path)
    title = "Two convolutions & no more, adversarially trained (some_network_of_that_kind)"
    zoo.write(tmp_path, "long", 0.5, title=title)
    zoo.write(tmp_path, "whole", 0.4, title="a" * 60)
    text = next(content.decode() for path, content in render(tmp_path).items() if path.name == "board.tex")
    found = re.search(r"& \\begin\{tabular\}\[t\]\{@\{\}l@\{\}\}(.*?)\\end\{tabular\} &", text)
    assert found
    lines = found[1].split(r" \\ ")
    assert len(lines) == 2
    assert all(len(line) <= 50 for line in lines)
    assert " ".join(lines) == latex(title)
    assert f"& {'a' * 60} &" in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex here")
def test_pdflatex_reads_the_tables(texts: dict[str, str], tmp_path: Path) -> None:
    body = "\n".join(f"\\input{{{name}}}\\par" for name in texts)
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "all.tex").write_text(
        f"\\documentclass{{article}}\n\\usepackage{{booktabs}}\n\\begin{{document}}\n{body}\n\\end{{document}}\n"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "-no-shell-escape", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
