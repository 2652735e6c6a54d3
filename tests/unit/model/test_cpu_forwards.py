"""Forwards in Rust of a model's modules: while requests run, while prefixes are trained, and for which modules."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2MLP, Qwen2RMSNorm

import prefixfast
import tiny
from prefixfast import _rust
from prefixfast.attention import cpu_dense
from prefixfast.model.cpu_forwards import CpuForwards
from prefixfast.model.cpu_layers import layer_norm

DTYPES = [torch.float32, torch.bfloat16]
NAMES = ("layer_norm", "gelu", "gelu_grad", "rms_norm", "rms_norm_grad", "gated_silu", "gated_silu_grad")


class Layers(nn.Module):
    """LayerNorm, every kind of GELU, RMSNorm and a gated feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        names = ("gelu", "gelu_pytorch_tanh", "gelu_new")
        self.acts = nn.ModuleList([nn.GELU(), nn.GELU("tanh"), *(ACT2FN[name] for name in names)])
        self.rms = LlamaRMSNorm(32)
        self.mlp = LlamaMLP(llama_config())
        self.requires_grad_(False)

    def forward(self, x):
        x = self.norm(x)
        for act in self.acts:
            x = act(x) + 1
        return self.mlp(self.rms(x))


def llama_config():
    return LlamaConfig(hidden_size=32, intermediate_size=48)


needs_rust = pytest.mark.skipif(not cpu_dense.is_fast(), reason="torch's operators are used here")


@pytest.fixture
def calls(monkeypatch):
    """Names of the functions in Rust that ran."""
    found = []
    for name in NAMES:
        own = getattr(_rust, name)
        monkeypatch.setattr(_rust, name, lambda *args, own=own, name=name: (found.append(name), own(*args))[1])
    return found


def forward_calls(dtype) -> list[str]:
    """Calls of a forward. In bf16 torch computes GELU without the hyperbolic tangent."""
    return ["layer_norm", *["gelu"] * (5 if dtype == torch.float32 else 3), "rms_norm", "gated_silu"]


@needs_rust
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forwards_run_in_rust_while_requests_run_and_are_restored(dtype, calls):
    torch.manual_seed(0)
    model, x = Layers().to(dtype), torch.randn(3, 5, 32).to(dtype)
    expected = model(x)
    forwards = CpuForwards(model)
    seen = []
    hook = model.norm.register_forward_hook(lambda _m, args, out: seen.append((args[0], out)))
    model(x)
    forwards.begin()
    model(x)
    assert not calls, "with gradients the modules' own forwards run"
    with torch.no_grad():
        got = model(x)
        assert calls == forward_calls(dtype)
        assert len(seen) == 3, "hooks are called as before"
        model.norm.weight.data.mul_(2)
        assert torch.equal(model.norm(x), layer_norm(x, model.norm.weight, model.norm.bias, 1e-5))
        model.norm.weight.data.div_(2)
        forwards.end()
        calls.clear()
        torch.testing.assert_close(model(x), expected)
        assert not calls
    assert (got - expected).float().norm() <= (2e-2 if dtype == torch.bfloat16 else 1e-5) * expected.float().norm()
    forwards.undo()
    hook.remove()
    assert not any("forward" in m.__dict__ for m in model.modules())


@needs_rust
def test_gradients_run_in_rust_while_prefixes_are_trained(calls):
    torch.manual_seed(0)
    model, x = Layers(), torch.randn(3, 5, 32)
    forwards = CpuForwards(model)

    def gradient():
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(model(leaf).pow(2).sum(), leaf)[0]

    expected = gradient()
    assert not calls
    forwards.begin(training=True)
    got = gradient()
    # LayerNorm's gradient is torch's.
    assert calls == [*forward_calls(torch.float32)[1:], "gated_silu_grad", "rms_norm_grad", *["gelu_grad"] * 5]
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    calls.clear()
    model.rms.weight.requires_grad_(True)
    gradient()
    assert "rms_norm" not in calls, "a weight that is trained gets its gradient from torch"
    forwards.end(training=True)
    calls.clear()
    gradient()
    assert not calls


@needs_rust
@pytest.mark.parametrize("module", [MistralRMSNorm(32), Qwen2RMSNorm(32), MistralMLP, Qwen2MLP], ids=str)
def test_copies_of_llama_s_layers_are_recognized(module):
    model = module if isinstance(module, nn.Module) else module(llama_config())
    assert model in CpuForwards(model).modules


def changed(forward):
    """A LlamaRMSNorm with another forward."""
    return type("Own", (LlamaRMSNorm,), {"forward": forward})(32)


@needs_rust
def test_other_layers_keep_their_own_forward(calls):
    def cube(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(3).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)

    def sqrt(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.sqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)

    gelu_mlp, hooked = LlamaMLP(llama_config()), LlamaMLP(llama_config())
    gelu_mlp.act_fn = nn.ReLU()
    seen = []
    hooked.act_fn.register_forward_hook(lambda *_: seen.append(1))
    model = nn.ModuleList([GemmaRMSNorm(32), changed(cube), changed(sqrt), gelu_mlp, hooked])
    forwards = CpuForwards(model)
    forwards.begin()
    with torch.no_grad():
        for module in model:
            x = torch.rand(6, 32)
            torch.testing.assert_close(module(x), type(module).forward(module, x))
        assert seen == [1, 1]
        LlamaRMSNorm(32).double()(torch.randn(6, 32).double())
        norm = LlamaRMSNorm(32)
        forwards = CpuForwards(norm)
        forwards.begin()
        assert norm(torch.randn(6, 32).bfloat16()).dtype == torch.float32  # an fp32 weight, as in transformers
    assert not calls


@needs_rust
def test_other_modules_and_tensors_keep_their_own_forward(calls):
    class Own(nn.LayerNorm):
        pass

    own, by_python, square = Own(32), ACT2FN["gelu_python"], nn.LayerNorm([4, 8])
    bare, mixed = nn.LayerNorm(32, bias=False), nn.LayerNorm(32).double()
    model = nn.Sequential(nn.Linear(32, 32), nn.LayerNorm(32), nn.GELU(), own, by_python, square, bare)
    forwards = CpuForwards(model)
    forwards.begin()
    x = torch.randn(6, 32)
    with torch.no_grad():
        for module in (own, by_python, bare):
            torch.testing.assert_close(module(x), type(module).forward(module, x))
        square(x.view(6, 4, 8))
        for odd in (x.double(), x.half(), x[:, ::2].T.contiguous().T, x[:0]):
            model[2](odd)
        model[1](torch.randn(32, 6).T)
        model[1].weight, model[1].bias = mixed.weight, mixed.bias
        model[1](x.double())
        with pytest.raises(RuntimeError):
            nn.LayerNorm.forward(model[1], x[:, :16].contiguous())
    assert not calls
    forwards.undo()
    assert not any("forward" in m.__dict__ for m in model.modules())


@needs_rust
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_train_uses_them_and_an_engine_that_stays_open_changes_nothing(name, calls, tokenizer):
    rows = [{"prompt": "ab", "completion": "cd"}] * 4
    how = {"prefix_length": 2, "max_steps": 2, "init": "random", "progress": False}
    with prefixfast.load(tiny.make(name), tokenizer=tokenizer) as base:
        before = prefixfast.train(base, rows, **how)
        wanted = {"gelu_grad"} if name == "gpt2" else {"gated_silu_grad", "rms_norm_grad"}
        assert wanted <= {*calls}
        with prefixfast.Engine(base) as engine:
            engine.generate(["ab"], max_new_tokens=2)
            assert prefixfast.train(base, rows, **how).digest == before.digest
        hf = base.hf
    assert not any("forward" in m.__dict__ for m in hf.modules())
