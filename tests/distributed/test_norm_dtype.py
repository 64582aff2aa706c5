"""The number of ranks decides no precision: a norm gives what it is given, as on one process."""

from __future__ import annotations

import norm_work
import pytest
import torch


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_global_norm_under_autocast_has_the_dtype_of_one_rank(gloo, dtype):
    alone = norm_work.normalised(dtype)
    together = torch.cat(gloo.run(2, norm_work.normalised, dtype))
    assert together.dtype == alone.dtype == getattr(torch, dtype)
    torch.testing.assert_close(together.float(), alone.float(), atol=3e-2, rtol=0)
