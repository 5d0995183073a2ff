"""python examples/custom_specification.py: attach, train, save and load a specification of your own.

Every two consecutive layers share one B, and all layers share one A. u is frozen at one, and v is trained from zero. It
runs in seconds on a tiny random model. You can use any causal language model of a known family instead.
"""

import sys
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tiedlora
from tiedlora import Factor, Part, Tying, errors


def main() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=4))
    tying = Tying(
        A=Factor(trained=True, init="uniform", share="all"),
        B=Factor(trained=True, init="uniform", share=2),
        u=Part(trained=False, init=1.0),
        v=Part(trained=True, init=0.0),
        targets=["qkv", "o"],
    )
    attached = tiedlora.attach(model, tying, rank=4)
    parts = attached.adapter.trained_parts()
    print({name: tuple(part.shape) for name, part in parts.items()})
    print(f"{attached.adapter.trainable_params():,} trained parameters")

    rows = torch.randint(0, 100, (8, 16))
    optimizer = torch.optim.AdamW(parts.values(), lr=1e-2, weight_decay=0.0)
    for step in range(10):
        loss = model(rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.4f}")

    folder = sys.argv[1] if len(sys.argv) > 1 else f"{tempfile.mkdtemp()}/adapter"
    attached.save_pretrained(folder)
    trained = model(rows, labels=rows).loss
    attached.detach()
    again = tiedlora.load(folder, model)
    assert torch.equal(model(rows, labels=rows).loss, trained)
    again.merge()
    print(f"saved to {folder}, loaded back, merged")


if __name__ == "__main__":
    with errors.exit_codes():
        main()
