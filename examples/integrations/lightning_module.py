"""Token merging in Lightning: by a callback, in tests and predictions of a model that is trained as it is.

    pip install lightning
    python examples/integrations/lightning_module.py

To train with merged tokens as well, call `token_merge_plugin.apply(module, 0.7)` before `trainer.fit`: checkpoints are
the same with and without. Weights and images are random, so that it runs without a network. For pretrained weights:
timm.create_model(..., pretrained=True).
"""

import lightning
import timm
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import token_merge_plugin
from token_merge_plugin.trial.counting import count_macs


class MergeTokens(lightning.Callback):
    def on_test_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        token_merge_plugin.apply(module, keep_rate=0.7)

    def on_test_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        token_merge_plugin.remove(module)

    on_predict_start, on_predict_end = on_test_start, on_test_end


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model("deit_tiny_patch16_224", num_classes=10)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def test_step(self, batch: list[torch.Tensor], index: int) -> None:
        self.log("GMACs", count_macs(self.model, batch[0]) / 1e9)
        self.log("loss", self.training_step(batch, index))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-4)


def main() -> None:
    loader = DataLoader(TensorDataset(torch.randn(4, 3, 224, 224), torch.randint(10, (4,))), batch_size=2)
    module = Classifier()
    trainer = lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, callbacks=[MergeTokens()]
    )
    trainer.fit(module, loader)
    before = count_macs(module.model, loader.dataset[0][0][None]) / 1e9
    after = trainer.test(module, loader)[0]["GMACs"]
    print(f"{before:.2f} -> {after:.2f} GMACs")


if __name__ == "__main__":
    main()
