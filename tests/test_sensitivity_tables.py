"""Published tables of measured KLDs."""

import gzip
from pathlib import Path

import pytest

from quantplan.costs.evidence import Measurement
from quantplan.errors import SourceError
from quantplan.formats.sensitivity_tables import (
    append_measurement,
    plain_type,
    read_sensitivity_table,
)


def written(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_wide_table(tmp_path: Path) -> None:
    """GGUF-Tool-Suite's layout: a row per type, a column per tensor, 404 for unmeasured."""
    text = "QTYPE,blk.0.attn_k.weight,blk.1.ffn_up.weight,group0\niq1_m,0.01,404,2.5\nbf16,,,0\n"
    found = read_sensitivity_table(written(tmp_path / "kld_results.csv", text))
    (single,) = found.singles
    assert (single.tensors, single.qtype) == (("blk.0.attn_k.weight",), "IQ1_M")
    assert single.kld_nats == pytest.approx(0.01)
    assert found.curve == {"IQ1_M": pytest.approx(2.5), "BF16": 0}
    assert found.n_unmeasured == 3
    assert found.baseline is None


def test_plain_table_compressed(tmp_path: Path) -> None:
    """The plain layout, gzipped, in any case and with the whole model as `all`."""
    text = "Tensor,QType,KLD\noutput.weight,q2_K,0.2\nall,Q2_K,0.9\n"
    found = read_sensitivity_table(written(tmp_path / "t.csv.gz", text))
    (single,) = found.singles
    assert (single.tensors, single.qtype) == (("output.weight",), "Q2_K")
    assert found.curve == {"Q2_K": pytest.approx(0.9)}


HEADER = "scope,tensor_or_group,bench_group,qtype,metric,value,flag\n"


def test_long_table_counts_bundles_once(tmp_path: Path) -> None:
    """Tensors of a bench group share one measurement; other layers' groups of that name do not."""
    rows = [
        f"tensor,blk.{layer}.attn_{part}.weight,group0,iq1_kt,kld,0.0{layer}5,"
        for layer in (1, 2)
        for part in "kv"
    ]
    found = read_sensitivity_table(written(tmp_path / "t.csv", HEADER + "\n".join(rows)))
    assert {m.tensors: m.kld_nats for m in found.singles} == {
        ("blk.1.attn_k.weight", "blk.1.attn_v.weight"): pytest.approx(0.015),
        ("blk.2.attn_k.weight", "blk.2.attn_v.weight"): pytest.approx(0.025),
    }


def test_equal_values_in_every_layer_are_one_measurement(tmp_path: Path) -> None:
    """Roles that agree to the last digit in most layers were measured together; a chance is not."""
    rows = []
    for layer in range(10):
        for role in ("ffn_up_shexp", "ffn_down_shexp"):
            rows.append(f"blk.{layer}.{role}.weight,iq1_kt,0.00{layer}123")
        attn_q = 0.5 if layer == 3 else 0.1 + layer / 100
        attn_k = 0.5 if layer == 3 else 0.3 + layer / 100
        rows += [f"blk.{layer}.attn_q.weight,iq1_kt,{attn_q}"]
        rows += [f"blk.{layer}.attn_k.weight,iq1_kt,{attn_k}"]
    found = read_sensitivity_table(
        written(tmp_path / "t.csv", "tensor,qtype,kld\n" + "\n".join(rows))
    )
    sizes = sorted(len(m.tensors) for m in found.singles)
    assert sizes == [1] * 20 + [2] * 10


def test_interleaved_copies_are_the_type_itself(tmp_path: Path) -> None:
    """`_R4` and its like hold the same numbers; their runs are averaged, and flagged rows not."""
    text = HEADER + (
        "all_tensors_pure,group0,,q4_K,kld,0.04,\n"
        "all_tensors_pure,group0,,q4_k_r4,kld,0.09,\n"
        "all_tensors_pure,group0,,q4_K,ppl,6.4,\n"
        "all_tensors_pure,group0,,iq4_ks,kld,,unmeasured404\n"
        "all_tensors_pure,group0,,q8_0,kld,0.0,\n"
        "tensor,output.weight,,q2_K,kld,0.1,\n"
    )
    found = read_sensitivity_table(written(tmp_path / "t.csv", text))
    assert found.curve == {"Q4_K": pytest.approx(0.06), "Q8_0": 0}
    assert found.baseline == "Q8_0"
    assert found.n_unmeasured == 1
    assert found.evidence.curve == {"Q4_K": pytest.approx(0.06)}
    assert plain_type("iq1_m_r4") == "IQ1_M"


def test_interpolated_rows_give_way_to_measured_ones(tmp_path: Path) -> None:
    """Where a table tells measured whole-model runs from filled-in ones, only the former count."""
    text = HEADER + (
        "all_tensors_pure,group0,,q4_K,kld,0.9,\n"
        "all_tensors_pure,group0:measured_only,,q4_K,kld,0.04,\n"
    )
    assert read_sensitivity_table(written(tmp_path / "t.csv", text)).curve == {
        "Q4_K": pytest.approx(0.04)
    }


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no KLDs"),
        ("a,b\n1,2\n", "must have a column QTYPE"),
        ("tensor,qtype,kld\nx,Q4_K,much\ny,Q4_K,-1\n", "x at Q4_K: 'much' is not a KLD\n"),
        ("tensor,qtype,kld\nx,Q4_K,nan\n", "'nan' is not a KLD"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, text: str, said: str) -> None:
    """A file without measurements, or with nonsense in it, is refused with every fault."""
    with pytest.raises(SourceError) as caught:
        read_sensitivity_table(written(tmp_path / "t.csv", text))
    assert said in str(caught.value)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_end_as_on_any_system(tmp_path: Path, end: str) -> None:
    """Line ends do not matter, nor do columns that are left out at the end of a line."""
    path = tmp_path / "table.csv"
    lines = ["tensor,qtype,kld,standard_error", "blk.0.ffn_up.weight,Q4_K,0.01", "all,Q4_K"]
    path.write_bytes(end.join([*lines, ""]).encode())
    found = read_sensitivity_table(path)
    assert [single.kld_nats for single in found.singles] == pytest.approx([0.01])
    assert found.n_unmeasured == 1


def test_perplexities_are_no_klds(tmp_path: Path) -> None:
    """A table of perplexities, which look alike, is refused; a mark of what failed is no value."""
    path = tmp_path / "table.csv"
    path.write_text("\ufeffQTYPE,blk.0.ffn_up.weight,output.weight\nQ4_K,5.71,404.0\n", "utf-8")
    with pytest.raises(SourceError, match="perplexities, not KLDs"):
        read_sensitivity_table(path)
    path.write_text("\ufeffQTYPE,blk.0.ffn_up.weight,output.weight\nQ4_K,0.01,404.0\n", "utf-8")
    assert read_sensitivity_table(path).n_unmeasured == 1


def test_a_damaged_archive_is_a_source_error(tmp_path: Path) -> None:
    """What cannot be unpacked is named."""
    path = tmp_path / "table.csv.gz"
    packed = gzip.compress(b"tensor,qtype,kld\n" * 100)
    path.write_bytes(packed[:12] + bytes(b ^ 255 for b in packed[12:]))
    with pytest.raises(SourceError, match=r"table\.csv\.gz cannot be read"):
        read_sensitivity_table(path)


def test_a_missing_file_is_a_source_error(tmp_path: Path) -> None:
    """A path that leads nowhere is said so."""
    with pytest.raises(SourceError, match="cannot be read"):
        read_sensitivity_table(tmp_path / "none.csv")


def test_names_of_columns_may_be_written_in_any_case(tmp_path: Path) -> None:
    """Groups, standard errors and chunks are read whatever the case and blanks of their columns."""
    rows = (
        "blk.0.attn_k.weight,Q4_0,0.01,0.002,attn_k,0.01 0.01\n"
        "blk.1.attn_k.weight,Q4_0,0.01,0.002,attn_k,\n"
    )
    plain = read_sensitivity_table(
        written(tmp_path / "a.csv", f"tensor,qtype,kld,standard_error,group,chunks\n{rows}")
    )
    odd = read_sensitivity_table(
        written(tmp_path / "b.csv", f"Tensor, QType,KLD,Standard_Error,GROUP,Chunks\n{rows}")
    )
    assert odd == plain
    assert len(odd.singles[0].tensors) == 2


def test_what_is_appended_begins_a_line(tmp_path: Path) -> None:
    """A table whose last line an editor left without an end stays readable."""
    table = written(tmp_path / "t.csv", "tensor,qtype,kld\noutput.weight,Q4_0,0.25")
    one = Measurement(("token_embd.weight",), "Q4_0", 0.5)
    append_measurement(table, one, "token_embd")
    klds = [single.kld_nats for single in read_sensitivity_table(table).singles]
    assert klds == [pytest.approx(0.25), pytest.approx(0.5)]


def test_the_word_that_is_no_number_is_named(tmp_path: Path) -> None:
    """A fault in a standard error or in a chunk is not blamed on the KLD."""
    text = (
        "tensor,qtype,kld,standard_error,group,chunks\n"
        "output.weight,Q4_0,0.01,n/a,,\ntoken_embd.weight,Q4_0,0.01,,,0.01 x\n"
    )
    with pytest.raises(SourceError) as found:
        read_sensitivity_table(written(tmp_path / "t.csv", text))
    one, other = found.value.faults
    assert one.endswith("'n/a' is not a standard error of a KLD")
    assert other.endswith("'x' is not a KLD of a chunk")


def test_equal_values_in_one_layer_are_two_measurements(tmp_path: Path) -> None:
    """KLDs that a person rounded are not taken for those of a bundle."""
    text = "tensor,qtype,kld\nblk.3.ffn_down.weight,Q4_K,0.01\nblk.3.ffn_up.weight,Q4_K,0.01\n"
    found = read_sensitivity_table(written(tmp_path / "t.csv", text))
    assert [len(one.tensors) for one in found.singles] == [1, 1]


def test_a_zero_does_not_erase_other_measurements(tmp_path: Path) -> None:
    """Repeated measurements of which one shows nothing count by their mean."""
    text = "tensor,qtype,kld\noutput.weight,Q4_0,0.02\noutput.weight,Q4_0,0\n"
    (one,) = read_sensitivity_table(written(tmp_path / "t.csv", text)).singles
    assert one.kld_nats == pytest.approx(0.01)


def test_a_gzipped_table_needs_no_suffix(tmp_path: Path) -> None:
    """What is gzipped is told by its content, and a plain table may be called .gz."""
    text = "tensor,qtype,kld\noutput.weight,Q4_0,0.02\n"
    packed, plain = tmp_path / "packed.csv", tmp_path / "plain.csv.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    plain.write_text(text)
    assert read_sensitivity_table(packed) == read_sensitivity_table(plain)


def test_kld_of_404_is_unmeasured_however_written(tmp_path: Path) -> None:
    """404 marks what was not measured, also with decimals."""
    text = "tensor,qtype,kld\noutput.weight,Q4_0,404.00\ntoken_embd.weight,Q4_0,0.02\n"
    found = read_sensitivity_table(written(tmp_path / "t.csv", text))
    assert (len(found.singles), found.n_unmeasured) == (1, 1)
