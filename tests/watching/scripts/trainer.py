"""HF Trainer on a GPT-2 or a Llama made from a config."""

import sys
import tempfile

import torch
import toy
import transformers

toy.seed()
size = {"vocab_size": toy.VOCABULARY, "bos_token_id": 0, "eos_token_id": 0}
if sys.argv[2] == "gpt2":
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=toy.LENGTH, **size)
    model = transformers.GPT2LMHeadModel(config)
else:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **size
    )
    model = transformers.LlamaForCausalLM(config)
data = [{"input_ids": row, "labels": row} for row in toy.batch(24)]
with tempfile.TemporaryDirectory() as folder:
    args = transformers.TrainingArguments(
        folder, max_steps=toy.STEPS, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    trainer = transformers.Trainer(model, args, train_dataset=data, eval_dataset=data[:4])
    trainer.train()
losses = [torch.tensor(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
toy.finish(losses, model)
