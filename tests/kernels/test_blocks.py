import pytest
import torch

from mmkv.kernels import Blocks, Spec, Table, gaussian, mean_only, minmax, pack_blocks, unpack_blocks, which_kernels

SPEC = Spec("channel", 32, ((8, gaussian(2)), (4, mean_only())), scale_bits=8)


def some(n=5, spec=SPEC):
    return pack_blocks(torch.randn(n, 32, 12), torch.randint(1, 33, (n,)), spec)


def test_select_and_cat():
    a, b = some(5), some(2)
    ids = torch.tensor([4, 0, 4])
    assert torch.equal(unpack_blocks(a.select(ids)), unpack_blocks(a)[ids])
    both = a.cat(b)
    assert len(both) == 7
    assert both.nbytes == a.nbytes + b.nbytes
    assert torch.equal(unpack_blocks(both), torch.cat([unpack_blocks(a), unpack_blocks(b)]))
    with pytest.raises(ValueError, match="same format"):
        a.cat(some(1, Spec("channel", 32, ((12, minmax(2)),))))


def test_bytes_are_of_the_storage():
    b = some(6)
    assert b.nbytes == 6 * (SPEC.code_bytes + SPEC.n_scale + 2 * SPEC.n_zero + 2)
    view = Blocks(b.codes[:1], b.scale[:1], b.zero[:1], b.top[:1], SPEC)
    assert view.nbytes == b.nbytes, "a view holds what it is a view of"
    assert b.to("cpu").tensors()[0] is b.codes
    assert Blocks.empty(SPEC, 3).nbytes == b.nbytes // 2


def test_wrong_tensors_raise():
    b = some(2)
    with pytest.raises(ValueError, match="codes is"):
        Blocks(b.codes.int(), b.scale, b.zero, b.top, SPEC)
    with pytest.raises(ValueError, match="zero is None"):
        Blocks(b.codes, b.scale, None, b.top, SPEC)
    with pytest.raises(ValueError, match="scale is"):
        Blocks(b.codes, b.scale[:, :-1], b.zero, b.top, SPEC)


def test_table_checks():
    i = torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(TypeError, match="int32"):
        Table(i.long(), i, i)
    with pytest.raises(ValueError, match="rows, slots"):
        Table(i, i[:1], i)


def test_which_kernels():
    want = "triton" if torch.cuda.is_available() else "torch"
    assert which_kernels()["attend_packed"] == want
    assert set(which_kernels().values()) == {want}
