"""The callbacks of HF Trainer, TRL and Lightning."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

import dynascope
from dynascope.watching.callbacks import DynascopeCallback


def tiny_llama() -> transformers.PreTrainedModel:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def arguments(folder: Path, **settings: object) -> dict[str, object]:
    shared = {"output_dir": str(folder), "use_cpu": True, "report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    return shared | {"logging_steps": 2, "max_steps": 6} | settings


def test_hf_trainer_is_watched_with_its_own_numbers(tmp_path: Path) -> None:
    data = [{"input_ids": row, "labels": row} for row in torch.randint(32, (16, 8))]
    settings = arguments(tmp_path, eval_strategy="steps", eval_steps=3, per_device_train_batch_size=4)
    trainer = transformers.Trainer(
        tiny_llama(),
        transformers.TrainingArguments(**settings),
        train_dataset=data,
        eval_dataset=data[:4],
        callbacks=[DynascopeCallback(every=2)],
    )
    trainer.train()
    record = dynascope.open(tmp_path / "dynascope")
    assert record["loss"].size == 6
    assert record["attention/entropy"].sizes == {"step": 3, "layer": 2, "head": 4}
    assert record["val/loss"].step.values.tolist() == [3, 6]
    assert record["trainer/loss"].step.values.tolist() == [2, 4, 6]
    assert record.config["config"]["max_steps"] == 6
    assert not [event for event in record.events if event.kind in ("probe-off", "watch-off")]


def test_trl_sft_trainer_is_watched(tmp_path: Path) -> None:
    import datasets
    import trl

    data = datasets.Dataset.from_dict({"input_ids": torch.randint(1, 32, (16, 8)).tolist()})
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_word_tokenizer(), pad_token="<0>", eos_token="<0>", bos_token="<0>"
    )
    trainer = trl.SFTTrainer(
        tiny_llama(),
        trl.SFTConfig(**arguments(tmp_path), per_device_train_batch_size=4, max_length=8, bf16=False),
        train_dataset=data,
        processing_class=tokenizer,
        callbacks=[DynascopeCallback(run=tmp_path / "run", every=2)],
    )
    trainer.train()
    record = dynascope.open(tmp_path / "run")
    assert record["loss"].size == 6
    assert record["attention/entropy"].sizes["layer"] == 2
    assert not [event for event in record.events if event.kind in ("probe-off", "watch-off")]


def _word_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({f"<{index}>": index for index in range(32)}, unk_token="<0>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def lightning_module():
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, fails_at: int | None = None) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
            self.fails_at = fails_at

        def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
            if index == self.fails_at:
                raise RuntimeError("out of data")
            loss = self.net(batch[0]).square().mean()
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: list[torch.Tensor], index: int) -> None:
            self.log("val_loss", self.net(batch[0]).square().mean())

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    return Module


def fit(folder: Path, fails_at: int | None = None) -> None:
    import lightning
    from torch.utils.data import DataLoader, TensorDataset

    from dynascope.watching.lightning import DynascopeLightning

    loader = DataLoader(TensorDataset(torch.randn(24, 3)), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, default_root_dir=folder,
        callbacks=[DynascopeLightning(every=2)],
    )  # fmt: skip
    trainer.fit(lightning_module()(fails_at), loader, loader)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_lightning_is_watched_with_its_own_metrics(tmp_path: Path) -> None:
    fit(tmp_path)
    record = dynascope.open(tmp_path / "dynascope")
    assert record["loss"].size == 6
    assert record["activations/rms"].sizes["module"] == 2
    assert record["train/loss"].size == 6
    assert record["val/loss"].size == 1
    assert not [event for event in record.events if event.kind in ("probe-off", "watch-off")]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_lightning_run_that_fails_keeps_its_record(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="out of data"):
        fit(tmp_path, fails_at=3)
    record = dynascope.open(tmp_path / "dynascope")
    assert record["loss"].size == 3
    assert [event.message for event in record.events if event.kind == "exception"] == ["RuntimeError: out of data"]
