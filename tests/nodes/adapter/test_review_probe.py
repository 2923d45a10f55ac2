from __future__ import annotations
from typing import Any
import copy, io
import pytest, torch
from pathlib import Path

def with_lora(patcher, lora, strength=0.7):
    import comfy.sd
    return comfy.sd.load_lora_for_models(patcher, None, dict(lora), strength, 0)[0]

@pytest.mark.parametrize("lora_too", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_wrapper(sd3, model, lora_too, inplace):
    outs = []
    name = next(n for n, _ in model.packed_modules(sd3[0].model) if n.endswith("x_block.mlp.fc1"))
    lora = model.make_lora(sd3[0].model, 1)
    for patcher in sd3:
        plain = model.run(patcher, load=True)
        p = with_lora(patcher, lora) if lora_too else patcher.clone()
        def f(w):
            if inplace:
                w *= 1.5
                return w
            return w * 1.5
        for n, _ in model.packed_modules(sd3[0].model):
            p.add_weight_wrapper(n + ".weight", f)
        outs.append(model.run(p, load=True) - plain)
    assert outs[1].abs().max() > 0.01
    assert model.relative_error(*outs) < 0.01

@pytest.mark.parametrize("how", ["half", "nothing"])
def test_save_partial(sd3, model, how, tmp_path):
    import comfy.utils
    lora = model.make_lora(sd3[0].model, 1)
    res = []
    for patcher in sd3:
        p = with_lora(patcher, lora)
        p.patch_model(p.load_device, lowvram_model_memory=1 if how == "nothing" else p.model_size() // 2)
        sd = p.state_dict_for_saving(None, None, None)
        for k in sd:
            if not sd[k].is_contiguous():
                sd[k] = sd[k].contiguous()
        comfy.utils.save_torch_file(sd, str(tmp_path / "x.safetensors"))
        from safetensors.torch import load_file
        res.append(load_file(tmp_path / "x.safetensors"))
        p.detach()
    assert res[0].keys() == res[1].keys()
    for k in res[1]:
        assert torch.allclose(res[0][k], res[1][k], rtol=1e-4, atol=1e-5), k

def first(sd3):
    sd = sd3[0].model.state_dict()
    return next(v for k, v in sd.items() if type(v).__name__ == "PackedStateTensor")

OPS = {
 "clone": lambda v: v.clone(), "cpu": lambda v: v.cpu(), "float": lambda v: v.float(), "half": lambda v: v.half(),
 "detach_clone": lambda v: v.detach().clone(), "detach_cpu": lambda v: v.detach().cpu(), "data_clone": lambda v: v.data.clone(), "data_cpu": lambda v: v.data.cpu(),
 "to": lambda v: v.to(torch.float32), "numpy": lambda v: v.numpy(), "detach_numpy": lambda v: v.detach().numpy(),
 "mul": lambda v: v * 1, "rmul": lambda v: 1 * v, "sub": lambda v: v - v, "eq": lambda v: (v == v).all(), "equal": lambda v: torch.equal(v, v),
 "index": lambda v: v[0], "view": lambda v: v.view(-1), "reshape": lambda v: v.reshape(-1), "T": lambda v: v.T, "mT": lambda v: v.mT, "contiguous": lambda v: v.contiguous(),
 "repr": lambda v: repr(v), "deepcopy": lambda v: copy.deepcopy(v), "type_as": lambda v: v.type_as(torch.zeros(1)), "device_eq": lambda v: v.device == torch.device("cpu"),
 "empty_on": lambda v: torch.zeros(1, device=v.device), "zeros_like": lambda v: torch.zeros_like(v), "empty_like": lambda v: torch.empty_like(v), "is_cuda": lambda v: v.is_cuda, "is_floating_point": lambda v: v.is_floating_point(),
 "itemsize": lambda v: v.itemsize, "stack": lambda v: torch.stack([v, v]), "norm": lambda v: v.norm(), "len": lambda v: len(v), "hash": lambda v: hash(v), "Parameter": lambda v: torch.nn.Parameter(v, requires_grad=False),
 "is_inference": lambda v: v.is_inference(), "stride": lambda v: v.stride(), "copy_into": lambda v: torch.zeros(v.shape).copy_(v), "copy_into_data": lambda v: torch.nn.Parameter(torch.zeros(v.shape)).data.copy_(v),
 "pickle": lambda v: (lambda b: (torch.save(v, b), b.seek(0), torch.load(b, weights_only=False))[2])(io.BytesIO()),
 "linear": lambda v: torch.nn.functional.linear(torch.zeros(1, v.shape[1]), v), "storage_ptr": lambda v: v.data_ptr(), "get_device": lambda v: v.get_device(), "is_contiguous_mf": lambda v: v.is_contiguous(memory_format=torch.contiguous_format),
 "size_kw": lambda v: v.size(dim=0), "new_zeros": lambda v: v.new_zeros(3), "inplace": lambda v: v.mul_(2), "pin": lambda v: v.pin_memory(), "tolist": lambda v: v[0].tolist(), "set_data": lambda v: setattr(torch.nn.Parameter(torch.zeros(v.shape)), "data", v),
 "dense_sd": lambda v: None,
}
@pytest.mark.parametrize("op", OPS)
def test_state_op(sd3, op):
    v = first(sd3)
    try:
        r = OPS[op](v)
    except BaseException as e:
        print("RES", op, "RAISED", type(e).__name__, str(e)[:150]); return
    d = (type(r).__name__, r.device if isinstance(r, torch.Tensor) else r) if not isinstance(r, (str, bool, int)) else r
    print("RES", op, str(d)[:150])
