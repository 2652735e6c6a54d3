"""Small files in the layouts of the public corpora of tables, with the rows that they hold.

Each follows a public file, which its comment names by repository and path. The texts are written for these tests.
"""

# ruff: noqa: RUF001
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Layout:
    """A file of a corpus.

    Attributes:
        task: Task that reads it.
        split: Split that it holds.
        name: Name of the file.
        text: Content.
        rows: Rows that it gives.
    """

    task: str
    split: str
    name: str
    text: str
    rows: list[dict[str, Any]]

    def write(self, folder: Path) -> Path:
        path = folder / self.name
        path.write_bytes(self.text.encode())
        return path


MILL, INN = "name[The Mill], eatType[pub], priceRange[£20-25]", "name[Café Inn], familyFriendly[yes]"

# tuetschek/e2e-dataset, devset.csv: header without quotes, lines that end with \r\n.
E2E_DEV = Layout(
    "e2e",
    "dev",
    "devset.csv",
    f'mr,ref\r\n"{MILL}","A pub, The Mill."\r\n"{INN}","A ""yes"" for children."\r\n"{MILL}",£20 or more.\r\n',
    [
        {"mr": MILL, "refs": ["A pub, The Mill.", "£20 or more."]},
        {"mr": INN, "refs": ['A "yes" for children.']},
    ],
)
# tuetschek/e2e-dataset, testset_w_refs.csv: header in quotes. trainset.csv has the same columns.
E2E_TRAIN = Layout(
    "e2e",
    "train",
    "trainset.csv",
    f'"mr","ref"\n"{MILL}","A pub, The Mill."\n"{MILL}","£20 or more."\n',
    [{"mr": MILL, "ref": "A pub, The Mill."}, {"mr": MILL, "ref": "£20 or more."}],
)
# tuetschek/e2e-dataset, testset.csv: one column, named in capitals.
E2E_INPUTS = Layout("e2e", "test", "testset.csv", f'MR\n"{MILL}"\n"{INN}"\n', [{"mr": MILL}, {"mr": INN}])
# XiangLi1999/PrefixTuning, data/e2e_data/src1_test.txt: source, two bars, tokenized text, space.
E2E_SOURCE = Layout(
    "e2e",
    "test",
    "src1_test.txt",
    "name : The Mill | Type : pub | price : £ 20 - 25||A pub , The Mill . \n"
    "name : The Mill | Type : pub | price : £ 20 - 25||£ 20 or more . \n"
    "name : Café Inn | family friendly : yes||It 's Café Inn . \n",
    [{"mr": MILL, "refs": ["A pub , The Mill . ", "£ 20 or more . "]}, {"mr": INN, "refs": ["It 's Café Inn . "]}],
)


def webnlg_entry(head: str, triples: str, texts: str) -> str:
    """An entry of WebNLG's XML; its original triples stand in two sets, as many do."""
    own = "".join(f"        <mtriple>{t}</mtriple>\n" for t in triples.split("\n"))
    first = (
        "      <originaltripleset>\n        <otriple>Old_Mill | place | Leeds</otriple>\n      </originaltripleset>\n"
    )
    return (
        f"    <entry {head}>\n{first}{first}      <modifiedtripleset>\n{own}      </modifiedtripleset>\n"
        f"{texts}    </entry>\n"
    )


def benchmark(*entries: str, declaration: str = "") -> str:
    return declaration + "<benchmark>\n  <entries>\n" + "".join(entries) + "  </entries>\n</benchmark>\n"


MILL_TRIPLES = [["Old_Mill", "location", '"Leeds, West"'], ["Old_Mill", "height_(m)", "25.0"]]
MILL_LINES = 'Old_Mill | location | "Leeds, West"\nOld_Mill | height_(m) | 25.0'
XML_DECLARATION = "<?xml version='1.0' encoding='UTF-8' standalone='yes'?>\n"

# XiangLi1999/PrefixTuning, data/webnlg_challenge_2017/train/1triples/1triple_allSolutions_Airport_train_challenge.xml
WEBNLG_2017 = Layout(
    "webnlg",
    "train",
    "1triple_allSolutions_Building_train_challenge.xml",
    benchmark(
        webnlg_entry(
            'category="Building" eid="Id1" size="2"',
            MILL_LINES,
            '      <lex comment="good" lid="Id1">The Old Mill &amp; its café are in Leeds.</lex>\n'
            '      <lex comment="toFix" lid="Id2">Mill Leeds.</lex>\n',
        ),
        webnlg_entry(
            'category="Food" eid="Id2" size="1"',
            "Soup | origin | Wales",
            '      <lex comment="toFix" lid="Id1">Soup Wales.</lex>\n',
        ),
    ),
    [
        {
            "triples": MILL_TRIPLES,
            "category": "Building",
            "subset": "seen",
            "id": "Id1",
            "refs": ["The Old Mill & its café are in Leeds."],
        }
    ],
)
# XiangLi1999/PrefixTuning, data/webnlg_challenge_2017/test/testdata_with_lex.xml
WEBNLG_2017_TEST = Layout(
    "webnlg",
    "test",
    "testdata_with_lex.xml",
    benchmark(
        webnlg_entry(
            'category="Building" eid="Id1" size="2"',
            MILL_LINES,
            '      <lex comment="good" lid="Id1">A mill.</lex>\n      <lex comment="good" lid="Id2">Two.</lex>\n',
        ),
        webnlg_entry(
            'category="Artist" eid="Id2" size="1"',
            "Ann_Lee | born | 1900",
            '      <lex comment="good" lid="Id1">Ann Lee, born 1900.</lex>\n',
        ),
        declaration=XML_DECLARATION,
    ),
    [
        {
            "triples": MILL_TRIPLES,
            "category": "Building",
            "subset": "seen",
            "id": "Id1",
            "refs": ["A mill.", "Two."],
        },
        {
            "triples": [["Ann_Lee", "born", "1900"]],
            "category": "Artist",
            "subset": "unseen",
            "id": "Id2",
            "refs": ["Ann Lee, born 1900."],
        },
    ],
)
# XiangLi1999/PrefixTuning, data/webnlg_challenge_2017/test/testdata_no_lex.xml: the first entry follows <entries>
# in its line.
WEBNLG_2017_INPUTS = Layout(
    "webnlg",
    "test",
    "testdata_no_lex.xml",
    benchmark(
        webnlg_entry('category="Building" eid="Id1" size="2"', MILL_LINES, ""), declaration=XML_DECLARATION
    ).replace("<entries>\n    ", "<entries>"),
    [{"triples": MILL_TRIPLES, "category": "Building", "subset": "seen", "id": "Id1"}],
)
# XiangLi1999/PrefixTuning, data/webnlg_challenge_2017/dev.json
WEBNLG_JSON = Layout(
    "webnlg",
    "train",
    "train.json",
    json.dumps(
        {
            "entries": [
                {
                    "1": {
                        "category": "Building",
                        "dbpedialinks": [],
                        "lexicalisations": [
                            {"comment": "good", "lang": "", "lex": "A mill in Leeds – é.", "xml_id": "Id1"},
                            {"comment": "toFix", "lang": "", "lex": "Mill Leeds.", "xml_id": "Id2"},
                        ],
                        "links": [],
                        "modifiedtripleset": [
                            {"object": '"Leeds, West"', "property": "location", "subject": "Old_Mill"},
                            {"object": "25.0", "property": "height_(m)", "subject": "Old_Mill"},
                        ],
                        "originaltriplesets": {"originaltripleset": [[]]},
                        "shape": "NA",
                        "shape_type": "NA",
                        "size": "2",
                        "xml_id": "Id7",
                    }
                }
            ]
        },
        indent=4,
    ),
    [
        {
            "triples": MILL_TRIPLES,
            "category": "Building",
            "subset": "seen",
            "id": "Id7",
            "refs": ["A mill in Leeds – é."],
        }
    ],
)
# dbpedia/Multilingual-RDF-Verbalizer, dataset/challenge2020_train_dev/en/train/2triples/Food.xml
WEBNLG_2020 = Layout(
    "webnlg",
    "dev",
    "Artist.xml",
    benchmark(
        webnlg_entry(
            'category="Artist" eid="Id1" shape="(X (X) (X))" shape_type="sibling" size="2"',
            MILL_LINES,
            '      <lex comment="good" lid="Id1">A mill.</lex>\n      <lex comment="toFix" lid="Id2">Mill.</lex>\n',
        ),
        webnlg_entry(
            'category="Film" eid="Id2" shape="(X (X))" shape_type="NA" size="1"',
            "Ann_Lee | born | 1900",
            '      <lex comment="good" lang="" lid="Id1">Ann Lee, born 1900.</lex>\n',
        ),
        declaration="<?xml version='1.0' encoding='utf-8'?>\n",
    ),
    [
        {
            "triples": MILL_TRIPLES,
            "category": "Artist",
            "subset": "seen",
            "id": "Id1",
            "shape": "(X (X) (X))",
            "refs": ["A mill.", "Mill."],
        },
        {
            "triples": [["Ann_Lee", "born", "1900"]],
            "category": "Film",
            "subset": "unseen",
            "id": "Id2",
            "shape": "(X (X))",
            "refs": ["Ann Lee, born 1900."],
        },
    ],
)
# dbpedia/Multilingual-RDF-Verbalizer, dataset/challenge2020_train_dev/ru/dev/1triples/Airport_allSolutions.xml: texts
# without comments, each beside the English one that it translates.
WEBNLG_RUSSIAN = Layout(
    "webnlg",
    "train",
    "Airport_allSolutions.xml",
    benchmark(
        webnlg_entry(
            'category="Building" eid="Id1" shape="(X (X) (X))" shape_type="sibling" size="2"',
            MILL_LINES,
            '      <lex lang="en" lid="Id1">A mill.</lex>\n      <lex lang="ru" lid="Id1">Мельница.</lex>\n'
            '      <lex lang="en" lid="Id2">In Leeds.</lex>\n      <lex lang="ru" lid="Id2">В Лидсе.</lex>\n'
            '      <dbpedialinks>\n        <dbpedialink direction="en2ru">Leeds | sameAs | Лидс</dbpedialink>\n'
            "      </dbpedialinks>\n      <links>\n"
            '        <link direction="en2ru">Old Mill | includes | мельница</link>\n      </links>\n',
        ),
        declaration="<?xml version='1.0' encoding='utf-8'?>\n",
    ),
    [
        {
            "triples": MILL_TRIPLES,
            "category": "Building",
            "subset": "seen",
            "id": "Id1",
            "shape": "(X (X) (X))",
            "lang": "ru",
            "refs": ["Мельница.", "В Лидсе."],
        }
    ],
)
DART_ROWS = [
    {"triples": [["Old Mill", "PLACE", "Leeds"], ["Old Mill", "É", ""]], "refs": ["A mill.", "Two."], "source": "e2e"},
    {"triples": [["a (b)", "NO._(X)", "1"]]},
]
# Yale-LILY/dart, data/v1.1.1/dart-v1.1.1-full-dev.json; some entries have no subtree_was_extended, and one of the test
# split has an empty text.
DART_JSON = Layout(
    "dart",
    "dev",
    "dart-v1.1.1-full-dev.json",
    json.dumps(
        [
            {
                "tripleset": DART_ROWS[0]["triples"],
                "subtree_was_extended": True,
                "annotations": [
                    {"source": "e2e", "text": "A mill."},
                    {"source": "WikiSQL_lily", "text": "Two."},
                    {"source": "WikiSQL_lily", "text": ""},
                ],
            },
            {"tripleset": DART_ROWS[1]["triples"], "annotations": []},
        ],
        indent=2,
        ensure_ascii=False,
    ),
    DART_ROWS,
)
# Yale-LILY/dart, data/v1.1.1/dart-v1.1.1-full-test.xml, with an empty text in entry Id116
DART_XML = Layout(
    "dart",
    "test",
    "dart-v1.1.1-full-test.xml",
    """<?xml version='1.0' encoding='utf-8'?>
<benchmark>
  <entries>
    <entry category="MISC" eid="Id1" size="2">
      <modifiedtripleset>
        <mtriple>Old Mill | PLACE | Leeds</mtriple>
        <mtriple>Old Mill | É | </mtriple>
      </modifiedtripleset>
      <lex comment="e2e" lid="Id1">A mill.</lex>
      <lex comment="WikiSQL_lily" lid="Id2">Two.</lex>
      <lex comment="WikiSQL_lily" lid="Id3" />
    </entry>
    <entry category="MISC" eid="Id2" size="1">
      <modifiedtripleset>
        <mtriple>a (b) | NO._(X) | 1</mtriple>
      </modifiedtripleset>
    </entry>
  </entries>
</benchmark>
""",
    DART_ROWS,
)


def cell(value: str, *, header: bool = False, columns: int = 1) -> dict[str, Any]:
    return {"value": value, "is_header": header, "column_span": columns, "row_span": 1}


MATCHES = [
    [cell("", header=True), cell("Cup", header=True, columns=2)],
    [cell("Year", header=True), cell("Games", header=True), cell("Goals", header=True)],
    [cell("1999", header=True), cell("12"), cell("é3")],
]
MATCHES_TABLE = [
    ["page_title", "Ann Lee"],
    ["section_title", "Career"],
    *[["cell", "é3"], ["col_header", "Cup"], ["col_header", "Goals"], ["row_header", "1999"]],
    *[["cell", "12"], ["col_header", "Cup"], ["col_header", "Games"], ["row_header", "1999"]],
    *[["cell", "1999"], ["col_header", ""], ["col_header", "Year"]],
]


def totto_line(*texts: str, **more: Any) -> str:
    notes = {"sentence_annotations": [{"original_sentence": "x", "final_sentence": t} for t in texts]} if texts else {}
    entry = {
        "table": MATCHES,
        "table_webpage_url": "x",
        "table_page_title": "Ann Lee",
        "table_section_title": "Career",
        "table_section_text": "",
        "highlighted_cells": [[2, 2], [2, 1], [2, 0]],
        "example_id": -8202683504666015907,
    }
    return json.dumps(entry | more | notes, ensure_ascii=False) + "\n"


ID = "-8202683504666015907"
# google-research/language, language/totto/sample/dev_sample.jsonl
TOTTO_DEV = Layout(
    "totto",
    "dev",
    "totto_dev_data.jsonl",
    totto_line("She scored.", "3 goals.", overlap_subset=True) + totto_line("None.", "No.", overlap_subset=False),
    [
        {"table": MATCHES_TABLE, "refs": ["She scored.", "3 goals."], "id": ID, "subset": "overlap"},
        {"table": MATCHES_TABLE, "refs": ["None.", "No."], "id": ID, "subset": "non-overlap"},
    ],
)
# google-research/language, language/totto/sample/train_sample.jsonl: one sentence, no subset
TOTTO_TRAIN = Layout(
    "totto",
    "train",
    "totto_train_data.jsonl",
    totto_line("She scored.", table_section_title=""),
    [{"table": [MATCHES_TABLE[0], *MATCHES_TABLE[2:]], "refs": ["She scored."], "id": ID}],
)
# google-research-datasets/ToTTo, README.md: the test split has no sentence_annotations
TOTTO_TEST = Layout(
    "totto",
    "test",
    "unlabeled_totto_test_data.jsonl",
    totto_line(overlap_subset=True),
    [{"table": MATCHES_TABLE, "id": ID, "subset": "overlap"}],
)
LAYOUTS = {name: value for name, value in globals().items() if isinstance(value, Layout)}
