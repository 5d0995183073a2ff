"""python examples/trainer.py [FOLDER]: Tied-LoRA in transformers' Trainer, as a method of PEFT. Needs tiedlora[peft].

The saved file holds each tied part once. The example uses a tiny random model in the place of yours.
"""

import sys
import tempfile

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from tiedlora import TiedLoraConfig, errors


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=4))


def main(folder: str) -> None:
    model = get_peft_model(tiny_model(), TiedLoraConfig(r=4, tying="TABuv", task_type="CAUSAL_LM"))
    model.print_trainable_parameters()
    rows = torch.randint(0, 100, (16, 12)).tolist()
    settings = TrainingArguments(
        folder,
        max_steps=10,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=5,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, settings, train_dataset=[{"input_ids": row, "labels": row} for row in rows]).train()
    model.save_pretrained(folder)
    for name, part in load_file(f"{folder}/adapter_model.safetensors").items():
        print(f"{name}: {tuple(part.shape)}")

    again = PeftModel.from_pretrained(tiny_model(), folder)
    ids = torch.tensor(rows[:2])
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
        merged = again.merge_and_unload()
        print(f"merged: {type(merged).__name__}")


if __name__ == "__main__":
    with errors.exit_codes():
        main(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp())
