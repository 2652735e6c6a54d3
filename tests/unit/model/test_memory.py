"""Free memory, and large memory pages."""

import sys

import pytest
import torch

from prefixfast.model import memory


def test_large_pages_hold_the_same_values():
    for size in (1, 1 << 10, 1 << 23):
        t = memory.in_large_pages(torch.empty(size))
        t.fill_(3.0)
        assert t.sum() == 3.0 * size


@pytest.mark.skipif(sys.platform != "linux", reason="reads files of Linux")
def test_the_file_cache_counts_as_free_in_a_container(monkeypatch, tmp_path):
    for name, text in (
        ("max", "1000\n"),
        ("current", "700\n"),
        ("stat", "anon 100\ninactive_file 300\nactive_file 50\n"),
    ):
        (tmp_path / f"memory.{name}").write_text(text, encoding="utf8")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.free_memory(torch.device("cpu")) == 600
    (tmp_path / "memory.max").write_text("max\n", encoding="utf8")
    assert memory.free_memory(torch.device("cpu")) > 10_000
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "none")
    assert memory.free_memory(torch.device("cpu")) > 10_000
