from bench import tables
from bench.lib.results import RESULTS, read


def test_the_table_shows_what_was_measured():
    results = read(RESULTS / "precision.json")
    shown = tables.precision_table(results).splitlines()
    float32, bfloat16, eight_bits = (line.split(" | ") for line in shown[2:5])
    assert float32[1:3] == ["0.00%", "1.00000"]
    assert 0 < float(bfloat16[1].strip("%")) < float(eight_bits[1].strip("%")) < 10
    assert float(eight_bits[2]) < float(bfloat16[2])
    assert "make bench-precision" in shown[-1]
