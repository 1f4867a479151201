from __future__ import annotations

import torch
import torch.nn.functional as F

from spectune.training.memory.live_bytes import LiveBytes, attention_of_gpus


def test_storages_are_counted_until_they_are_freed() -> None:
    x = torch.zeros(10, requires_grad=True)
    with LiveBytes([x]) as counter:
        y = x.exp()
        assert counter.live == 40
        assert y.view(2, 5).shape == (2, 5)  # a view shares the storage
        assert counter.live == 40
        z = y + 1
        assert (counter.live, counter.peak) == (80, 80)
        del z
        assert (counter.live, counter.peak) == (40, 80)
        del y
    assert (counter.live, counter.peak) == (0, 80)


def test_attention_on_the_meta_device_keeps_no_matrix() -> None:
    q, k, v = (torch.zeros(1, 2, 128, 16, device="meta", requires_grad=True) for _ in range(3))
    plain_function = F.scaled_dot_product_attention
    out, row_sums = 4 * 2 * 128 * 16, 4 * 2 * 128
    with attention_of_gpus(), LiveBytes([q, k, v]) as fused:
        kept = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert fused.live == out + row_sums
    assert F.scaled_dot_product_attention is plain_function
    with LiveBytes([q, k, v]) as plain:
        again = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert plain.live > 4 * 2 * 128 * 128
    assert kept.shape == again.shape


def test_attention_on_other_devices_is_unchanged() -> None:
    q = torch.randn(1, 2, 8, 4)
    expected = F.scaled_dot_product_attention(q, q, q, is_causal=True)
    with attention_of_gpus():
        assert torch.equal(F.scaled_dot_product_attention(q, q, q, is_causal=True), expected)
