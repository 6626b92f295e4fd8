"""How a batch is split into parts that fit a memory budget."""

import torch

from cytosae.training.matmul import MatmulConfig, iter_parts


def test_parts_cover_all_tokens_and_none_is_larger_than_the_budget():
    for n_tokens, longest in ((1, 5), (5, 5), (6, 5), (1028, 100), (1028, 1)):
        parts = list(iter_parts(n_tokens, longest))
        assert [token for part in parts for token in range(part.start, part.stop)] == list(range(n_tokens))
        assert max(part.stop - part.start for part in parts) <= longest
        assert len(parts) == -(-n_tokens // longest)
    assert MatmulConfig(torch.float32, max_bytes=4000).n_tokens(100) == 10
    assert MatmulConfig(torch.bfloat16, max_bytes=4000).n_tokens(100) == 20
    assert MatmulConfig(max_bytes=1).n_tokens(100) == 1
