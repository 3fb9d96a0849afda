from __future__ import annotations

from benchmarks.gpu.report import add_roofline, as_markdown


def test_the_page_of_a_run() -> None:
    """Every kind of row, from figures that are easy to check."""
    place = {"graph": "encode", "batch": 8, "dtype": "float16"}
    row = place | {"side": "tensorrt", "median_s": 0.004, "p95_s": 0.005, "calls": 50}
    row |= {"pictures_per_s": 2000.0, "memory_bytes": 3 * 10**9, "largest_batch": 8}
    one = row | {"batch": 1, "median_s": 0.001, "pictures_per_s": 1000.0}
    missing = place | {"side": "compile", "why": "a | b"}
    wrong = place | {"side": "tensorrt-rtx", "wrong": "c | d"}
    parity = {"equal_codes": 0.95, "agreement": 0.998, "decode_psnr": 51.23, "largest_flip_margin": 0.01, "failures": []}
    report = {
        "command": "python benchmarks/on_gpu.py",
        "device": {"name": "Card", "architecture": "sm89", "memory_bytes": 1, "driver": "1", "cuda": "13.0", "cudnn": 9},
        "versions": {"torch": "2.13.0"},
        "pace": {"rounds": 50, "seconds": 30},
        "product_size": 8192,
        # The better of both times counts.
        "peaks": {"before": {"float16": 7.4e14, "copy": 0.8e12}, "after": {"float16": 7.0e14, "copy": 1.0e12}},
        "tokenizers": [
            {
                "variant": "clipb_256",
                "flops": {"encode": 185 * 10**9},
                "weights": {"encode": 250 * 10**6},
                "parity": {"tensorrt": parity},
                "rows": [row, one, missing, wrong],
            }
        ],
        "generator": None,
        "failed": [],
    }
    add_roofline(report)
    page = as_markdown(report)
    assert "encode: 185.00 GFLOP a picture, 92.50 G multiply-adds, 250.0 M weights" in page
    # 8 x 185 GFLOP at 740 TFLOP/s; 500 MB at 1 TB/s.
    side = "tokenflow-sdk, TensorRT, float16 (for at most 8 at once: more do not fit)"
    figures = "4.00 ms | 5.00 ms | 2,000.00 | 3,000 MB | 370.00 | 2.00 ms (product) | 50% |"
    assert f"| 8 | {side} | {figures}" in page
    assert f"| 1 | {side} | 1.00 ms | 5.00 ms | 1,000.00 | 3,000 MB | 185.00 | 0.50 ms (weights) | 50% |" in page
    assert "| 8 | torch.compile, float16 | not available: a / b |  |  |  |  |  |  |" in page
    assert "| 8 | tokenflow-sdk, TensorRT-RTX, float16 | WRONG RESULTS, not timed: c / d |  |  |  |  |  |  |" in page
    assert "| tokenflow-sdk, TensorRT, float16 | 95.00% | 99.80% | 51.2 dB |  |" in page
    assert "| product of two matrices of float16, TFLOP/s (8,192 x 8,192) | 740.00 | 700.00 |" in page
    assert "| copy of one matrix of float32, TB/s read and written (8,192 x 8,192) | 0.80 | 1.00 |" in page
    assert "may exceed 100 %" in page
    assert "on a CPU" not in page
