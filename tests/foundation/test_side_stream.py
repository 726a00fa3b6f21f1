"""Work beside the next batch: the order of what comes, and on a GPU that it waits for what it reads."""

from __future__ import annotations

import pytest
import torch

from utils.side_stream import SideStream, one_late


@pytest.mark.parametrize("count", range(4))
def test_each_comes_when_the_next_is_there(count: int) -> None:
    seen = []

    def made():
        for number in range(count):
            seen.append(number)
            yield number

    for expected, number in enumerate(one_late(made())):
        assert number == expected and seen == list(range(min(number + 2, count)))
    assert len(seen) == count


@pytest.mark.gpu
def test_it_waits_for_what_it_reads_and_keeps_its_memory() -> None:
    side = SideStream(torch.device("cuda", 0))
    large, found = torch.rand(4096, 4096, device="cuda"), []
    for number in range(8):
        values = torch.full((1 << 20,), -1.0, device="cuda")
        for _ in range(4):
            large = large @ large * 1e-3  # the usual stream is late
        values.fill_(number)
        mark = side.mark()
        with side.after(mark, values):
            found.append(values * 1)
            assert torch.cuda.current_stream() != torch.cuda.default_stream()
        del values
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.synchronize()
    assert [value.unique().tolist() for value in found] == [[number] for number in range(8)]
