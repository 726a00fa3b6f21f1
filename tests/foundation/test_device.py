"""How a run uses the machine it is on."""

import pytest
import torch

from utils.device import few_threads


@pytest.mark.parametrize(("kind", "set_by_user", "expected"), [("cuda", None, 4), ("cuda", "7", 7), ("cpu", None, 7)])
def test_few_threads_beside_a_gpu(kind, set_by_user, expected, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if set_by_user:
        monkeypatch.setenv("OMP_NUM_THREADS", set_by_user)
    usual = torch.get_num_threads()
    torch.set_num_threads(7)
    try:
        with pytest.raises(KeyboardInterrupt), few_threads(torch.device(kind)):
            assert torch.get_num_threads() == expected
            raise KeyboardInterrupt
        assert torch.get_num_threads() == 7
    finally:
        torch.set_num_threads(usual)
