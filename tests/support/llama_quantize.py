"""llama.cpp's llama-quantize, as far as quantplan calls it, around the real library.

No Python package brings llama.cpp's program, but one brings the library of which it is a thin
shell. This reads the program's command line as the program does and calls the library.
"""

import argparse
import sys
from pathlib import Path
from stat import S_IXUSR

from quantplan.qtypes import QTYPES
from quantplan.quantize.imatrix import read_imatrix
from tests.support.quantizer import run_library

ROOT = Path(__file__).parents[2]


def program(folder: Path) -> Path:
    """Puts the program into a folder."""
    path = folder / "llama-quantize"
    path.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from tests.support.llama_quantize import main\nmain()\n"
    )
    path.chmod(path.stat().st_mode | S_IXUSR)
    return path


def main() -> None:
    """Quantizes, prints what the library prints, and ends with its code."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--allow-requantize", action="store_true")
    parser.add_argument("--pure", action="store_true")
    parser.add_argument("--tensor-type-file", type=Path)
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--override-kv", action="append", default=[])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("ftype")
    parser.add_argument("threads", type=int)
    found = parser.parse_args()
    words = found.tensor_type_file.read_text().split() if found.tensor_type_file else []
    rules = [word.lower().split("=", 1) for word in words]
    metadata = dict(text.split("=str:", 1) for text in found.override_kv)
    importance = read_imatrix(found.imatrix) if found.imatrix else {}
    code, log = run_library(
        found.source,
        found.target,
        found.ftype,
        found.threads,
        pure=found.pure,
        allow_requantize=found.allow_requantize,
        overrides=[(pattern, QTYPES[name.upper()].ggml_id) for pattern, name in rules],
        imatrix={name: values.ravel().tolist() for name, values in importance.items()},
        metadata=metadata,
    )
    print(log, file=sys.stderr)
    sys.exit(code)
