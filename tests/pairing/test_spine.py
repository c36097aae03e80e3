from __future__ import annotations

import torch

from lwkd.pairing.spine import parents, spine, topological_order


def test_in_order_puts_every_node_behind_what_it_read():
    x = torch.rand(3, requires_grad=True)
    y = (x * 2).exp()
    end = (y + x).sum().grad_fn
    order = topological_order([end])
    assert order[-1] is end
    for i, node in enumerate(order):
        assert all(order.index(parent) < i for parent, _ in parents(node))
    assert len(set(order)) == len(order)


def test_a_long_chain_does_not_recurse():
    x = torch.rand(1, requires_grad=True)
    for _ in range(5000):
        x = x * 1
    assert len(topological_order([x.grad_fn])) == 5001


def test_the_spine_leaves_out_what_an_edge_jumps_over():
    start = torch.rand(4, requires_grad=True).clone()
    inside = start.exp()
    joined = start + inside
    end = joined.sin()
    assert list(spine([start.grad_fn], end.grad_fn)) == [start.grad_fn, joined.grad_fn, end.grad_fn]


def test_two_sources_meet_before_the_spine_begins():
    one, other = torch.rand(4, requires_grad=True).clone(), torch.rand(4, requires_grad=True).clone()
    met = one.exp() + other
    assert list(spine([one.grad_fn, other.grad_fn], met.grad_fn)) == [met.grad_fn]


def test_the_spine_knows_which_output_of_a_node_is_used():
    start = torch.rand(4, requires_grad=True).clone()
    one, other = start.chunk(2)
    assert spine([start.grad_fn], other.sin().grad_fn)[other.grad_fn] == (1, 1)
    assert other.grad_fn not in spine([start.grad_fn], (one + other).grad_fn)


def test_no_path_no_spine():
    start, weight = torch.rand(4, requires_grad=True).clone(), torch.rand(4, requires_grad=True)
    assert spine([start.grad_fn], weight.exp().grad_fn) == {}
    assert spine([], weight.exp().grad_fn) == {}
